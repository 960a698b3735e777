"""Named texts from the Hugging Face hub, as lists of documents.

The ``datasets`` library is an extra and is imported on use: a text file, or the text in the package, needs neither it
nor a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HubText:
    """One column of one split.

    ``files`` picks files of the repository where a whole split would be a needless download, or where the repository
    only loads by file; ``shuffle`` is the seed of the order that the published recipe fixes.
    """

    path: str
    split: str
    column: str = "text"
    config: str | None = None
    files: str | None = None
    revision: str | None = None
    shuffle: int | None = None


def wikitext2(split: str) -> HubText:
    """WikiText-2 raw, every line including the empty ones."""
    return HubText("Salesforce/wikitext", split, config="wikitext-2-raw-v1")


def c4(split: str, shards: int) -> HubText:
    """The first shard of English C4."""
    return HubText("allenai/c4", split, files=f"en/c4-{split}.00000-of-{shards:05d}.json.gz")


def ptb(split: str) -> HubText:
    """Penn Treebank sentences, from the hub's Parquet copy: the repository itself only holds a loading script."""
    return HubText(
        "ptb-text-only/ptb_text_only",
        split,
        column="sentence",
        files=f"penn_treebank/{split}/*.parquet",
        revision="refs/convert/parquet",
    )


PILE = HubText("mit-han-lab/pile-val-backup", "validation", shuffle=42)


def fetch(text: HubText) -> Sequence[str]:
    """The documents of ``text``, read lazily from the local cache after the first download.

    Raises:
        ValueError: the ``datasets`` library is missing, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("named texts need the datasets library: pip install 'lowbit[data]'") from error
    try:
        loaded = datasets.load_dataset(
            text.path,
            text.config,
            split=text.split,
            data_files=None if text.files is None else {text.split: text.files},
            revision=text.revision,
        )
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"could not load '{text.path}' from the hub: no network? give a text file instead") from error
    if text.shuffle is not None:
        loaded = loaded.shuffle(seed=text.shuffle)
    documents: Sequence[str] = loaded[text.column]
    return documents
