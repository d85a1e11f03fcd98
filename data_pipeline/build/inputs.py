"""Finds the texts that settings name, inspects their files and joins them."""

import difflib
from pathlib import Path

from data_pipeline.build.datasets import NAMES, named_text
from data_pipeline.build.inspection import joined, look_at, refuse_binary, remarks
from data_pipeline.build.sources import Text, TextFile, find_text
from data_pipeline.progress import Progress
from data_pipeline.settings import CorpusSettings


def find_texts(
    settings: CorpusSettings, cache: Path, workers: int, progress: Progress | None
) -> tuple[dict[str, Text], str]:
    """Returns the texts ready to be read, and a description of them in one line.

    The texts are split -> its text, for explicit files; else "" -> the text to be cut into splits.

    Raises:
      ValueError: a text does not exist, is in two splits, or has a binary file that is not allowed.
    """
    texts = _named_or_found(settings, cache, progress)
    _refuse_shared(texts)
    separator = settings.file_separator_bytes()
    files = [file for text in texts.values() for file in text.files]
    found = look_at(files, separator, cache / "memo", workers)
    if settings.binary == "refuse":
        refuse_binary(files, found)
    rest = iter(found)
    looks = {split: [next(rest) for _ in text.files] for split, text in texts.items()}
    texts = {split: joined(text, looks[split], separator) for split, text in texts.items()}
    words = (f"{split or settings.corpus}: {remarks(text, looks[split])}" for split, text in texts.items())
    return texts, "; ".join(words)


def _named_or_found(settings: CorpusSettings, cache: Path, progress: Progress | None) -> dict[str, Text]:
    if settings.train:
        if settings.split != "contiguous":
            raise ValueError(f"split={settings.split} cuts one text: it cannot be used with explicit --train files")
        specs = {"train": settings.train, "valid": settings.valid, "test": settings.test}
        return {split: find_text(spec) for split, spec in specs.items() if spec}
    if settings.corpus in NAMES:
        return {"": named_text(settings.corpus, cache, progress)}
    near = difflib.get_close_matches(settings.corpus, NAMES, 1)
    try:
        return {"": find_text(settings.corpus)}
    except ValueError as error:
        raise ValueError(f"{error}" + (f" (or did you mean the corpus named {near[0]}?)" if near else "")) from None


def _refuse_shared(texts: dict[str, Text]) -> None:
    """Raises ValueError if a file is in two splits: held-out text would be trained on."""
    of: dict[object, tuple[str, TextFile]] = {}
    for split, text in texts.items():
        for file in text.files:
            first, other = of.setdefault(file.identity, (split, file))
            if first != split:
                raise ValueError(
                    f"{file.path} of --{split} is {other.path} of --{first} as well: name it in one of them only"
                )
