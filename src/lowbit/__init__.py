"""lowbit: a Hugging Face language model and a recipe in, a smaller model that real software loads out.

The public names are imported when first used, so that `import lowbit` and `lowbit --help` cost no import of torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import evaluate, export, generate, import_model, load, quantize

# torch then asks Linux for large pages. Tensors come and go by the megabyte here: small pages would cost a run a
# twentieth of its time, in page faults. It must be known before the first tensor, and whoever sets it is heeded.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "generate", "import_model", "load", "quantize"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
