"""Settings of a corpus and of the streams read from it, frozen: names, defaults, help and checks.

Each field is made by `setting`; flags, `config.json` and the rules of resuming are derived from the fields, so that a
setting is declared once.
"""

import dataclasses
from typing import Any

from data_pipeline.vocabulary import escaped_bytes

# Steps, sizes and rates are int32 and float32 on the device.
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), mutable: bool = False) -> Any:
    """Returns a dataclass field with its help text.

    Args:
      default: the value if neither flagfile nor command line gives one; its type is that of the flag.
      help: one sentence for `--help`.
      choices: the allowed values of a string.
      mutable: a run may change it when it is resumed, because it does not enter the mathematics.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "mutable": mutable})


def check_choices(settings: Any) -> None:
    """Raises ValueError if a field of the dataclass `settings` is not among its choices."""
    for field in dataclasses.fields(settings):
        choices, value = field.metadata.get("choices"), getattr(settings, field.name)
        if choices and value not in choices:
            raise ValueError(f"{field.name}={value!r} is not one of {', '.join(choices)}")


def check_numbers(settings: Any) -> None:
    """Raises ValueError if a number of the dataclass `settings` is not finite, or too large for the device."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:  # NaN fails this as well
            raise ValueError(f"{field.name}={value} is not a finite float32")
        if isinstance(value, int) and abs(value) > LARGEST_INT and not field.name.endswith("_bytes"):
            raise ValueError(f"{field.name}={value} must be at most {LARGEST_INT}")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the settings `names` is less than `least`."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            words = f"at least {least}" if least else "0 or more"
            raise ValueError(f"{name}={value} must be {words}")


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """The text, its symbols and its splits."""

    corpus: str = setting(
        "python",
        "A prepared directory or its URL (s3://, gs://, az://, https://); a text file, a quoted glob or a directory of "
        "text files; or a name: python (the standard library's source), tinyshakespeare, enwik8, text8.",
        mutable=True,  # a run is checked against the fingerprint of the corpus, not against its place
    )
    vocabulary: str = setting(
        "bytes",
        "Symbols: bytes (any file; 256 symbols) or characters (Unicode code points of the training split).",
        choices=("bytes", "characters"),
    )
    vocabulary_of: str = setting(
        "",
        "characters only: a prepared corpus whose vocabulary this one takes, so that both can be mixed; characters "
        "that it lacks are unknown.",
        mutable=True,
    )
    min_count: int = setting(1, "characters only: a character seen fewer times in the training split is unknown.")
    valid_fraction: float = setting(0.05, "Fraction of the text that is the validation split.")
    test_fraction: float = setting(0.05, "Fraction of the text that is the test split (the end of the text).")
    split: str = setting(
        "contiguous",
        "contiguous: train, validation, test in the order of the text; or columns:BxT, char-rnn's split: the text is B "
        "equal columns of whole windows of T symbols and the last windows of each column are held out; or hash: each "
        "document (a plain file is one) is in the split that its content says, so that equal ones are in one.",
    )
    input_kind: str = setting(
        "auto",
        "How files are read: auto (by the endings of their names), or all as text, jsonl, csv, parquet, arrow or xml "
        "(a dump of MediaWiki).  Those that end with .gz, .zst, .xz or .bz2 are decompressed in any case.",
        choices=("auto", "text", "jsonl", "csv", "parquet", "arrow", "xml"),
    )
    text_field: str = setting("text", "jsonl, csv, parquet, arrow: the field or column that has the text.")
    document_separator: str = setting(
        r"\x00",
        r"End of a document, one symbol or several (\n\n, \0, <|endoftext|>): put after each document of jsonl, csv, "
        r"parquet, arrow and xml, and where --reset_state=document resets; a prepared corpus knows its own.  Escapes "
        r"are \n \r \t \f \v \0 \\ \xHH \uHHHH \UHHHHHHHH; in a vocabulary of bytes \xHH is a byte.",
    )
    bad_documents: str = setting(
        "refuse",
        "Documents that cannot be used (no JSON, no text in the field, the separator within): refuse the text, or drop "
        "them, up to 1 in 1,000.",
        choices=("refuse", "drop"),
    )
    include: str = setting("", "Globs of the names of files to take, with commas: *.txt,*.md.  Empty: all.")
    exclude: str = setting("", "Globs of the names of files to leave out, with commas.")
    file_separator: str = setting(
        r"\n",
        r"Ending of a file that another one follows: its missing part is added; escapes are allowed (\n, \0, "
        r"'<|endoftext|>').  Nothing is added after the last file; if empty, nothing is added at all.",
    )
    binary: str = setting(
        "refuse",
        "Files that are not text (compressed, pictures, mostly NUL): refuse them, or allow them, to learn their bytes.",
        choices=("refuse", "allow"),
        mutable=True,
    )
    # So may the place of explicit texts.
    train: str = setting(
        "", "Explicit training text (file, glob or directory) instead of --corpus and fractions.", mutable=True
    )
    valid: str = setting("", "Explicit validation text, with --train.", mutable=True)
    test: str = setting("", "Explicit test text, with --train.", mutable=True)
    cache_dir: str = setting(
        "~/.cache/charlstm", "Directory of downloaded texts and prepared corpora, keyed by content.", mutable=True
    )
    cache_bytes: int = setting(
        8 * 2**30, "Disk below --cache_dir for what was read from object stores; 0: none.", mutable=True
    )
    remote_patience: float = setting(
        600.0, "Seconds that an object store may not answer before the program ends with exit status 69.", mutable=True
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.min_count < 1:
            raise ValueError(f"min_count={self.min_count} must be at least 1")
        if self.vocabulary_of and self.vocabulary != "characters":
            raise ValueError(
                f"vocabulary_of={self.vocabulary_of} needs --vocabulary=characters: all texts share the vocabulary of "
                "bytes"
            )
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        check_at_least(self, 0, "cache_bytes", "remote_patience")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} leave nothing to train on"
            )
        if (self.valid or self.test) and not self.train:
            raise ValueError("--valid and --test name explicit files and need --train beside them")
        if self.split not in ("contiguous", "hash"):
            parse_columns(self.split)
        self.file_separator_bytes()

    def file_separator_bytes(self) -> bytes:
        """Returns the file separator in UTF-8, with its escapes replaced.  Raises ValueError if they are malformed."""
        return self._separator_bytes("file_separator")

    def document_separator_bytes(self) -> bytes:
        """Returns the document separator as `file_separator_bytes` does."""
        return self._separator_bytes("document_separator")

    def _separator_bytes(self, name: str) -> bytes:
        try:
            separator = escaped_bytes(getattr(self, name))
            if self.vocabulary == "characters":
                separator.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"{name}={getattr(self, name)!r} is not UTF-8: with vocabulary=characters write \\u00HH for \\xHH"
            ) from None
        except ValueError as error:
            raise ValueError(f"{name}={getattr(self, name)!r}: {error}") from None
        return separator


def without_effect(settings: CorpusSettings) -> list[str]:
    """Returns a sentence for each setting of preparing a text that another one leaves without effect."""
    usual, found = CorpusSettings(), []
    if settings.min_count != usual.min_count and settings.vocabulary == "bytes":
        found.append(f"min_count={settings.min_count} is of characters: give --vocabulary=characters, or leave it out")
    elif settings.min_count != usual.min_count and settings.vocabulary_of:
        found.append(
            f"min_count={settings.min_count} chooses among counted characters, and --vocabulary_of="
            f"{settings.vocabulary_of} has chosen: leave one out"
        )
    for name in ("valid_fraction", "test_fraction") if settings.train else ():
        value = getattr(settings, name)
        if value not in (0, getattr(usual, name)):
            found.append(f"{name}={value} divides one text, and --train names texts of their own: leave one out")
    return found


def parse_columns(split: str) -> tuple[int, int]:
    """Returns the two numbers of `columns:BxT`.  Raises ValueError if `split` has another form."""
    head, _, sizes = split.partition(":")
    columns, _, window = sizes.partition("x")
    if head != "columns" or not (columns.isdecimal() and window.isdecimal() and int(columns) and int(window)):
        raise ValueError(f"split={split!r} is neither contiguous, hash nor columns:BxT, such as columns:50x50")
    return int(columns), int(window)


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """Reading of the training split: B streams, windows of T symbols."""

    batch_size: int = setting(64, "B: streams in the global batch, spaced evenly through the training split.")
    window: int = setting(128, "T: symbols in a window, the length of truncated backpropagation through time.")
    window_deviation: int = setting(
        0,
        "Standard deviation of the windows' lengths, which are window + k window_deviation, with k from -2 to 2 at the "
        "probabilities 1, 4, 6, 4, 1 of 16; the learning rate is scaled by length / window.",
    )
    short_window_probability: float = setting(0.0, "Fraction of the windows that have half the length instead.")
    mixture: str = setting(
        "",
        "Several corpora of one vocabulary in place of --corpus, each with its share of the symbols that are read: "
        "[NAME=]CORPUS:WEIGHT,... such as data/web:0.6,data/books:0.4.",
        mutable=True,  # a run is checked against the fingerprints and the weights, not against places
    )
    mixture_from: str = setting(
        "",
        "Other weights of the mixture from a step on: STEP:NAME:WEIGHT,... such as 100000:web:0.2,books:0.8; further "
        "ones follow after a semicolon.  A corpus that is not named is not read then.  A resumed run may change what "
        "lies ahead of it.",
        mutable=True,  # a run is checked against what it has read
    )
    segment: int = setting(
        -1,
        "Symbols of a segment.  A stream reads one segment with carried state, then another of the corpus that has the "
        "next turn.  0: a stream stays in one corpus and reads it in the order of the text.  -1: 0 for one corpus; for "
        "a mixture 1048576, halved until each corpus has a segment for each stream that reads it at a time.",
    )
    shuffle_segments: bool = setting(True, "Segments come in an order drawn for each pass, not that of the text.")
    reverse: bool = setting(
        False,
        "Read the text backward, each split from its last symbol to its first: the model predicts what stands before, "
        "and writes from right to left.  The same prepared corpus serves both directions.",
    )
    rotate_streams: bool = setting(
        True, "Each epoch, and each pass over a corpus in segments, starts at another seeded offset."
    )
    reset_state: str = setting(
        "stream",
        "When recurrent state is reset: stream (where a stream begins anew) or document (there, and at each "
        "--document_separator).",
        choices=("stream", "document"),
    )
    reset_probability: float = setting(
        0.01,
        "Probability of a random state reset of a stream before a window.  A model that never starts from zero "
        "state in training cannot be trusted to start from it when it is evaluated or sampled.",
    )
    reader_threads: int = setting(1, "Threads that read windows ahead; one or two are enough.", mutable=True)
    read_ahead: int = setting(8, "Windows read ahead of the training step.", mutable=True)

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.reset_probability <= 1:
            raise ValueError(f"reset_probability={self.reset_probability} must be from 0 to 1")
        if not 0 <= self.short_window_probability <= 1:
            raise ValueError(f"short_window_probability={self.short_window_probability} must be from 0 to 1")
        check_at_least(self, 1, "batch_size", "window", "reader_threads", "read_ahead")
        check_at_least(self, 0, "window_deviation")
        check_at_least(self, -1, "segment")
        if self.batch_size * self.longest_window > LARGEST_INT:
            raise ValueError(
                f"batch_size={self.batch_size} x {self.longest_window} symbols of a window must be at most "
                f"{LARGEST_INT} symbols an update: lower batch_size or window"
            )
        length = self.window // 2 if self.short_window_probability else self.window
        if length <= 2 * self.window_deviation:
            raise ValueError(
                f"window_deviation={self.window_deviation} leaves nothing of a window of {length} symbols that is two "
                f"deviations shorter: use at most {max(0, length - 1) // 2}, or a longer window than {self.window}"
            )

    @property
    def longest_window(self) -> int:
        """Returns the largest number of symbols that a window can have."""
        return self.window + 2 * self.window_deviation
