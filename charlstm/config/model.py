"""Frozen settings of the recurrent language model."""

import dataclasses

from data_pipeline.settings import check_at_least, check_choices, check_numbers, setting

FUSED_UNITS = 128  # lstm_backend=fused needs widths that are multiples of it: the threads in a block of its kernels
MOST_LAYERS, MOST_ROUNDS = 256, 64  # each is traced and compiled by itself


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The recurrent language model."""

    cell: str = setting("lstm", "The recurrent cell.", choices=("lstm", "gru", "rnn", "mlstm", "layer_norm_lstm"))
    nonlinearity: str = setting("tanh", "rnn: tanh or relu.", choices=("tanh", "relu"))
    cap_input_gate: bool = setting(
        False, "The LSTMs: the input gate is at most 1 minus the forget gate, which bounds the cell state."
    )
    num_layers: int = setting(2, "L: recurrent layers.")
    hidden_size: int = setting(256, "H: hidden units of each layer.")
    last_hidden_size: int = setting(0, "Hidden units of the last layer; 0: hidden_size.")
    embedding_size: int = setting(0, "E: width of the symbol embedding; 0 feeds one-hot symbols, as char-rnn does.")
    tie_embeddings: bool = setting(
        False, "The softmax uses the embedding's own weights (needs E = H of the last layer)."
    )
    skip: bool = setting(False, "The sum of all layers' outputs feeds the softmax, not the last layer's alone.")
    input_dropout: float = setting(0.0, "Dropout of the first layer's input, embedded or one-hot.")
    layer_dropout: float = setting(0.0, "Dropout of every other layer's input.")
    output_dropout: float = setting(0.0, "Dropout before the softmax; with skip, of the sum.")
    dropout_mask: str = setting(
        "window",
        "What one mask of input, layer and output dropout is drawn for: window (locked, variational dropout) or "
        "symbol.",
        choices=("window", "symbol"),
    )
    embedding_dropout: float = setting(
        0.0, "Symbols whose embedding is zeroed for a window, the same for all streams; a tied softmax keeps them."
    )
    weight_drop: float = setting(0.0, "Dropout of the recurrent weights, one mask for a window and all its streams.")
    state_dropout: float = setting(0.0, "Dropout of the state before each symbol; a mask is constant over a window.")
    zoneout: float = setting(0.0, "A unit keeps its hidden state over a symbol with this probability.")
    zoneout_cell: float = setting(0.0, "The LSTMs: a unit keeps its cell state over a symbol with this probability.")
    mogrifier_rounds: int = setting(0, "The LSTMs: rounds in which input and state scale each other; 0: no mogrifier.")
    mogrifier_rank: int = setting(0, "Rank of the mogrifier's matrices; 0: full.")
    weight_norm: bool = setting(False, "Recurrent weights are learned as directions and lengths (weight norm).")
    train_initial_state: bool = setting(False, "The state from which a stream starts is learned, not zero.")
    forget_bias: float = setting(1.0, "Initial bias of the LSTM's forget gate.")
    initializer: str = setting(
        "pytorch",
        "Weights at the start: pytorch (uniform +-1/sqrt(H); the embedding normal, of deviation .3 unless it is tied), "
        "uniform (+-init_scale), normal (deviation init_scale), glorot, or orthogonal (recurrent weights; the others "
        "glorot).",
        choices=("pytorch", "uniform", "normal", "glorot", "orthogonal"),
    )
    init_scale: float = setting(0.08, "Scale of --initializer=uniform and normal.")
    compute_dtype: str = setting(
        "float32",
        "Type of the matrix products' operands; master parameters, recurrent state and softmax stay float32.",
        choices=("float32", "bfloat16"),
    )
    tf32: bool = setting(
        True,
        "compute_dtype=float32 on NVIDIA GPUs since Ampere: training rounds the products' operands to TF32, of 10 bits "
        "after the point, and is several times as fast.  Scoring and sampling never do.",
        mutable=True,  # as lstm_backend
    )
    lstm_backend: str = setting(
        "scan",
        "How an LSTM computes a window: scan (a loop compiled by XLA, on any device), fused (this project's "
        "kernels, on NVIDIA GPUs from Hopper on) or auto (the faster one, timed when the run starts).",
        choices=("scan", "fused", "auto"),
        mutable=True,  # the equations are the same; bits are not
    )
    remat: bool = setting(
        False,
        "Gradient checkpointing: keep the state at only some symbols of a window, and recompute the rest in the "
        "backward pass.  Less memory, more time.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(self, 1, "num_layers", "hidden_size")
        for name, most in (("num_layers", MOST_LAYERS), ("mogrifier_rounds", MOST_ROUNDS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {most}: more take hours to compile")
        check_at_least(self, 0, "init_scale")
        if self.embedding_size < 0:
            raise ValueError(f"embedding_size={self.embedding_size} must be 0 (one-hot) or more")
        for name in ("input_dropout", "layer_dropout", "output_dropout", "embedding_dropout", "weight_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.embedding_dropout and not self.embedding_size:
            raise ValueError(
                f"embedding_dropout={self.embedding_dropout} needs an embedding, and embedding_size=0 has none: use "
                "input_dropout, which drops whole symbols of one-hot input"
            )
        if self.nonlinearity != "tanh" and self.cell != "rnn":
            raise ValueError(f"nonlinearity={self.nonlinearity} is one of cell=rnn, and this is cell={self.cell}")
        drawn_for_symbols = [name for name in ("zoneout", "zoneout_cell") if getattr(self, name)]
        if self.dropout_mask == "symbol" and (self.input_dropout or self.layer_dropout):
            drawn_for_symbols.append("dropout_mask=symbol")
        if self.remat and drawn_for_symbols:
            raise ValueError(f"remat reads a window in pieces, and {drawn_for_symbols[0]} draws a mask for the whole")
        self._check_cell()
        if beyond := self.unsupported_by(self.lstm_backend):
            raise ValueError(f"lstm_backend={self.lstm_backend} does not know {beyond}: use auto or scan")
        name = "last_hidden_size" if self.last_hidden_size else "hidden_size"
        last = getattr(self, name)
        if self.tie_embeddings and self.embedding_size != last:
            raise ValueError(f"tie_embeddings needs embedding_size={self.embedding_size} to equal {name}={last}")
        if self.skip and self.num_layers > 1 and last != self.hidden_size:
            raise ValueError(
                f"skip adds the outputs of all layers: last_hidden_size={last} must be hidden_size={self.hidden_size}"
            )

    def _check_cell(self) -> None:
        """Raises ValueError where a setting does not go with the cell, or with another one of the cell's."""
        check_at_least(self, 0, "last_hidden_size", "mogrifier_rounds", "mogrifier_rank")
        for name in ("state_dropout", "zoneout", "zoneout_cell"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        for name in ("cap_input_gate", "zoneout_cell", "mogrifier_rounds"):
            if getattr(self, name) and not self.cell.endswith("lstm"):
                value = getattr(self, name)
                raise ValueError(f"{name}={value} is an LSTM's, and this is cell={self.cell}: use lstm or mlstm")
        if self.mogrifier_rounds and not self.embedding_size:
            raise ValueError(
                f"mogrifier_rounds={self.mogrifier_rounds} scales the embedded symbol, and embedding_size=0 has none"
            )
        if self.mogrifier_rank and not self.mogrifier_rounds:
            raise ValueError(f"mogrifier_rank={self.mogrifier_rank} does nothing with mogrifier_rounds=0: use 5 or 6")
        if self.weight_norm and self.cell == "layer_norm_lstm":
            raise ValueError("weight_norm gives the weights lengths that cell=layer_norm_lstm divides out: drop one")
        if self.weight_norm and self.initializer in ("uniform", "normal") and not self.init_scale:
            raise ValueError("weight_norm needs directions to start from, and init_scale=0 draws none: use 0.08")

    @property
    def widths(self) -> tuple[int, ...]:
        """H of each layer."""
        return (self.hidden_size,) * (self.num_layers - 1) + (self.last_hidden_size or self.hidden_size,)

    @property
    def variant(self) -> str:
        """Variant of the cell's equations."""
        match self.cell:
            case "rnn":
                return self.nonlinearity
            case "gru":
                return ""
        return "capped" if self.cap_input_gate else "plain"

    def unsupported_by(self, recurrence: str) -> str:
        """The first setting that `recurrence` does not support, as name=value; "" if it supports this model."""
        if recurrence != "fused":
            return ""
        others = ["cell"] if self.cell != "lstm" else []
        options = ["train_initial_state", "zoneout", "zoneout_cell", "mogrifier_rounds"]
        others += [name for name in options if getattr(self, name)]
        others += [name for name in ("hidden_size", "last_hidden_size") if getattr(self, name) % FUSED_UNITS]
        return f"{others[0]}={getattr(self, others[0])}" if others else ""

    @property
    def with_scan(self) -> "ModelConfig":
        """The same model, computed as on any device."""
        return dataclasses.replace(self, lstm_backend="scan")

    @property
    def takes_raw_input(self) -> bool:
        """True if the recurrence takes a layer's input itself, not its projection x W_x."""
        return bool(self.mogrifier_rounds)

    @property
    def has_custom_vjp(self) -> bool:
        """True if the cell's hand-derived backward pass covers all settings; else autodiff is used."""
        return not (self.zoneout or self.zoneout_cell or self.mogrifier_rounds or self.train_initial_state)
