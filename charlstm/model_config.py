"""Frozen settings of the recurrent language model."""

import dataclasses

from data_pipeline.settings import check_at_least, check_choices, check_numbers, setting


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The recurrent language model."""

    cell: str = setting("lstm", "The recurrent cell.", choices=("lstm", "gru", "rnn", "mlstm"))
    nonlinearity: str = setting("tanh", "rnn: tanh or relu.", choices=("tanh", "relu"))
    cap_input_gate: bool = setting(
        False, "lstm, mlstm: the input gate is at most 1 minus the forget gate, which bounds the cell state."
    )
    num_layers: int = setting(2, "L: recurrent layers.")
    hidden_size: int = setting(256, "H: hidden units of each layer.")
    embedding_size: int = setting(0, "E: width of the symbol embedding; 0 feeds one-hot symbols, as char-rnn does.")
    tie_embeddings: bool = setting(False, "The soft-max uses the embedding's own weights (needs E = H).")
    skip: bool = setting(False, "The sum of all layers' outputs feeds the soft-max, not the last layer's alone.")
    input_dropout: float = setting(0.0, "Dropout of the first layer's input, embedded or one-hot.")
    between_dropout: float = setting(0.0, "Dropout of every other layer's input.")
    output_dropout: float = setting(0.0, "Dropout before the soft-max; with skip, of the sum.")
    dropout_mask: str = setting(
        "window",
        "What one mask of input, between and output dropout is drawn for: window (locked, variational dropout) or "
        "symbol.",
        choices=("window", "symbol"),
    )
    embedding_dropout: float = setting(
        0.0, "Symbols whose embedding is zeroed for a window, the same for all streams; a tied soft-max keeps them."
    )
    weight_drop: float = setting(0.0, "Dropout of the recurrent weights, one mask for a window and all its streams.")
    forget_bias: float = setting(1.0, "Initial bias of the LSTM's forget gate.")
    initializer: str = setting(
        "pytorch",
        "Weights at the start: pytorch (uniform +-1/sqrt(H)), uniform (+-init_scale), normal (deviation init_scale), "
        "glorot, or orthogonal (recurrent weights; the others glorot).",
        choices=("pytorch", "uniform", "normal", "glorot", "orthogonal"),
    )
    init_scale: float = setting(0.08, "Scale of --initializer=uniform and normal.")
    compute_dtype: str = setting(
        "float32",
        "Type of the matrix products' operands; master parameters, recurrent state and soft-max stay float32.",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(self, 1, "num_layers", "hidden_size")
        check_at_least(self, 0, "init_scale")
        if self.embedding_size < 0:
            raise ValueError(f"embedding_size={self.embedding_size} must be 0 (one-hot) or more")
        for name in ("input_dropout", "between_dropout", "output_dropout", "embedding_dropout", "weight_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.embedding_dropout and not self.embedding_size:
            raise ValueError(
                f"embedding_dropout={self.embedding_dropout} needs an embedding, and embedding_size=0 has none: use "
                "input_dropout, which drops whole symbols of one-hot input"
            )
        if self.nonlinearity != "tanh" and self.cell != "rnn":
            raise ValueError(f"nonlinearity={self.nonlinearity} is one of cell=rnn, and this is cell={self.cell}")
        if self.cap_input_gate and self.cell not in ("lstm", "mlstm"):
            raise ValueError(f"cap_input_gate needs an input gate, and cell={self.cell} has none: use lstm or mlstm")
        if self.tie_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"tie_embeddings needs embedding_size={self.embedding_size} to equal hidden_size={self.hidden_size}"
            )
