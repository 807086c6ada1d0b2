"""featxfer: label-free transfer of high-resolution features to low-resolution images.

What is public is re-exported in `__init__.pyi`, on one screen. A name is imported when it is first
asked for, and nothing else is: `featxfer --help` needs no torch.
"""

from featxfer.lazy import lazily

__getattr__, __dir__ = lazily(__name__)

__version__ = "0.1.0"
