"""Lines of the log at the beginning and the end of a run."""

from charlstm import distributed
from charlstm.config.training import OptimizerConfig
from charlstm.run import estimate, memory
from charlstm.run.checkpoint import Checkpoints
from charlstm.run.metrics import MetricAggregator, duration
from charlstm.run.services import Outcome
from charlstm.run.start import Run
from charlstm.training import schedules
from charlstm.types import PlateauState


def beginning(run: Run, step: int) -> list[str]:
    """Says on what the run trains, from `step` on, and what is evaluated."""
    training, optimizer, model, plan = run.config.training, run.config.optimizer, run.config.model, run.plan
    epochs, corpus = training.num_steps / plan.steps_per_epoch, run.corpus
    size, vocabulary = corpus.sources.bytes, corpus.vocabulary
    parameters = estimate.count_parameters(run.config, vocabulary.size)
    lines = [
        f"text: {corpus.name}, {_number(corpus.sources.files, 'file')} of {memory.format_bytes(size)}: "
        f"{plan.symbols:,} symbols to train on, of {vocabulary.size:,} {vocabulary.kind}",
        f"model: {model.cell}, {model.num_layers} x {model.hidden_size}, "
        f"{parameters:,} parameters; {_number(epochs, 'epoch')} of the text",
        f"training on {distributed.describe(run.mesh)}: step {step} of {training.num_steps}, "
        f"{_number(run.plan.steps_per_epoch, 'step')} an epoch, {_number(training.logical_shards, 'logical shard')}",
    ]
    if training.reduction == "exact" and (platform := run.mesh.devices.flat[0].platform) != "cpu":
        lines.append(bits_on(platform))
    if model.compute_dtype == "float32" and model.tf32 and run.mesh.devices.flat[0].platform == "gpu":
        lines.append("training rounds the operands of float32 products to TF32 where the GPU can: --notf32 does not")
    if optimizer.eval_params_field == "average":
        lines.append(f"what is evaluated is the average of the parameters (average={optimizer.average})")
    return lines


def _number(count: float, of: str) -> str:
    """Returns "1 file", "2 files"."""
    return f"{count:{',' if isinstance(count, int) else '.2g'}} {of}{'' if count == 1 else 's'}"


def bits_on(platform: str) -> str:
    """Says what was not verified of equal bits on other devices than CPUs, and what they rest on there."""
    flags = "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"
    return (
        f"equal bits were seen on CPUs, not yet on {platform}: there XLA times kernels when it compiles, and takes the "
        f"fastest; XLA_FLAGS='{flags}' fixes the choice, at some cost in speed"
    )


def turn(optimizer: OptimizerConfig, step: int, before: PlateauState, now: PlateauState) -> list[str]:
    """Says what changes by the evaluation at `step`: the learning rate, or that averaging begins."""
    where = f"step {step}: evaluation {int(now.evaluations)}, {int(now.patience_count)} without gain:"
    lines = []
    if now.dropped and not before.dropped:
        lines.append(f"{where} from here on the learning rate is times {optimizer.decay_rate:g}")
    if now.averaged and not before.averaged:
        lines.append(f"{where} from here on the parameters are averaged")
    return lines


def already_finished(run: Run, metrics: MetricAggregator, step: int) -> str:
    """Says why a run that is at `step` has nothing to do; "" if it has."""
    if step >= (last := run.config.training.num_steps):
        rate = schedules.final_rate(run.config.optimizer, step)
        at = "" if rate is None else f", at a learning rate of {rate:g}: for another decay begin a new run"
        return f"finished: the run is at step {step}, and num_steps={last}; a larger --num_steps goes on{at}"
    if metrics.exhausted:
        return f"finished: {_no_gain(metrics, step)}; a larger --stop_after goes on"
    return ""


def ending(
    run: Run, metrics: MetricAggregator, checkpoints: Checkpoints, step: int, seconds: float, gave_up: bool
) -> tuple[Outcome, str]:
    """Says how the run ended at `step`, after `seconds` of this process.

    Args:
      gave_up: it ended as too many saves had failed.
    """
    last = run.config.training.num_steps
    if checkpoints.failed_saves:
        left = f"the checkpoint of step {max(steps)}" if (steps := checkpoints.steps()) else "the beginning"
        words = f"ended at step {step}, which could not be saved; the same command goes on from {left}"
        return Outcome.NOT_SAVED, words
    if metrics.exhausted:
        return Outcome.FINISHED, f"finished: {_no_gain(metrics, step)}, {duration(seconds)} in this process"
    if step < last or metrics.evaluation_due:
        why = "as saves had failed (max_failed_saves)" if gave_up else "by a signal"
        return Outcome.STOPPED, f"stopped {why} at step {step}, saved; the same command goes on"
    return Outcome.FINISHED, f"finished: {last} steps, {duration(seconds)} in this process"


def _no_gain(metrics: MetricAggregator, step: int) -> str:
    return f"{metrics.without_gain} evaluations without gain (stop_after) at step {step}"
