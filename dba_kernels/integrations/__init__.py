"""Where people train: one file per framework that needs more than the optimizer itself.

``transformers``: the Hugging Face ``Trainer``, TRL's trainers, and what is built on them (Axolotl). Others take
``DBAAdamW`` as it is; ``README.md`` beside this file says what to write.
"""
