"""Where people train. One file per framework that needs more than the optimizer itself; nothing is imported until asked.

``transformers``: the Hugging Face ``Trainer``, TRL's trainers, and what is built on them (Axolotl). The others take
``DBAAdamW`` as it is; the README's "Use it with" says what to write.
"""
