"""Where people train: one file per framework that needs more than the optimizer itself.

``transformers``: the Hugging Face ``Trainer``, TRL's trainers, and what is built on them (Axolotl). Others take
``DBAAdamW`` as it is; the README's "Use it with" says what to write.
"""
