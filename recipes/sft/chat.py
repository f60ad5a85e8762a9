"""Supervised fine-tuning: maximise the log-probability of the assistant's tokens.

    loss = - sum_t w_t log p(token_t | tokens before t) / sum_t w_t        over the batch; w is 1 on trained tokens, else 0

Left out: gradient accumulation (the engine cuts any batch into micro-batches; gradients add up exactly),
label smoothing, and example packing as an option (the engine always packs; sequences never see each other).

    uv run cook sft                                          # SmolLM2-135M on grade-school problems, minutes on a CPU
    uv run cook sft model=qwen3-8b data=no_robots            # a CUDA GPU
    uv run cook sft data=file data.path=my.jsonl epochs=3
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from cookbook.config import DataConfig, EngineConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig
from cookbook.data import load_supervised
from cookbook.data_log import write_data
from cookbook.eval_samples import EvalSamples
from cookbook.memory import peak_memory_gb
from cookbook.origin import settle
from cookbook.renderers import load_renderer
from cookbook.run import Run
from cookbook.schedule import adam_at, peak_learning_rate, total_steps
from cookbook.service import check_context, check_vocabulary, connect, new_trainer, opened, resumed
from core import Datum, ForwardBackwardOutput, Future, OptimStepOutput


@dataclass
class Config:
    name: str | None = None  # of the run; null: made from model, data and time
    run_dir: str | None = None  # null: runs/<name>
    seed: int = 0  # adapter init and data order
    steps: int | None = None  # optimizer steps; null: `epochs` passes over the rows
    epochs: float = 1.0
    batch_size: int = 32  # sequences per step
    learning_rate: float | None = None  # peak; null: the model's default (printed at the start)
    max_length: int = 2048  # tokens per sequence
    init_from: str | None = None  # a run, a tinker:// URI or an adapter directory to start from
    eval_every: int = 20  # steps; 0: only before and after
    save_every: int = 50  # steps; 0: only at the end (the best evaluated weights are saved too)
    save_minutes: float = 10.0  # also after so many minutes; 0: never
    keep_last: int = 3  # checkpoints kept, beside the best and the final one
    service: str = "local"  # local, the URL of a server, or tinker: the hosted one
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)


def main(config: Config) -> None:
    with Run(config, "sft/chat", best="eval/held_out/nll") as run:
        service = connect(config.service, run.store, config.engine)
        found = resumed(run, service)
        origin = settle(run, service, config.lora, config.init_from)
        loading = None if found else new_trainer(service, config.model, config.lora, config.seed, origin)
        renderer = load_renderer(config.model)  # while the model loads
        data = load_supervised(
            config.data, renderer, seed=config.seed, batch_size=config.batch_size, max_length=config.max_length,
            console=run.console,
        )  # fmt: skip
        run.reads(data.report)
        trainer = found[1] if found else opened(loading)
        info = trainer.get_info()
        check_context(config.max_length, info)
        check_vocabulary(renderer.tokenizer, info)
        num_steps = total_steps(config.steps, config.epochs, data.epoch_steps)
        peak = peak_learning_rate(config.learning_rate, config.optim, info, "sft")
        run.record("engine.token_budget", info.token_budget)
        run.note(f"{num_steps} steps of {config.batch_size} sequences, learning rate {peak:.3g}, {info.dtype} on {info.device}")

        def submit(step: int) -> Submitted:
            batch = mean_over_trained_tokens(data.batch(step))
            if step == 0:
                write_data(run.dir, 1, "trained", batch, None, renderer.texts_of)
            gradient = trainer.forward_backward(batch, "cross_entropy", logprobs="weighted")
            update = trainer.optim_step(adam_at(step, num_steps, peak, config.optim))
            return Submitted(step, gradient, update, num_tokens=sum(d.model_input.length for d in batch))

        samples = EvalSamples(run, config.eval, renderer, trainer, data.held_out, config.seed)

        evaluates = bool(data.held_out or config.eval.env)

        def evaluate(done: int, final: bool = False) -> dict[str, float]:
            if not data.held_out:
                return samples(done)
            batch = mean_over_trained_tokens(data.held_out)
            output = trainer.forward(batch, "cross_entropy", logprobs="weighted").result()
            write_data(run.dir, done, "held_out", batch, output, renderer.texts_of)
            nll = output.metrics["loss:sum"]
            return {"held_out/nll": nll, **(samples(done, final) if math.isfinite(nll) else {})}  # run.log stops at nan

        if not found and evaluates:
            run.log_eval("before", evaluate(0))
        run.begin(num_steps)
        start, num_tokens = (found[0]["step"], found[0]["loop"]["tokens"]) if found else (0, 0)
        last_end = last_save = time.monotonic()
        in_flight = submit(start) if start < num_steps else None
        while in_flight:
            now, done, final = in_flight, in_flight.step + 1, in_flight.step + 1 == num_steps
            stop = run.should_stop
            eval_due = evaluates and (final or every(config.eval_every, done))
            save_due = final or stop or every(config.save_every, done)
            save_due |= 0 < 60 * config.save_minutes < time.monotonic() - last_save
            # the next batch is in flight before this result is read, unless these weights are wanted first
            in_flight = None if eval_due or save_due else submit(done)
            nll, grad_norm = results(now, data.rows_of(now.step))
            num_tokens += now.num_tokens
            seconds, last_end = time.monotonic() - last_end, time.monotonic()
            if eval_due:
                run.log_eval("after" if final else "during", evaluate(done, final))
                save_due |= run.is_best
            run.log(done, {
                "train/nll": nll, "optim/lr": adam_at(now.step, num_steps, peak, config.optim).learning_rate,
                "optim/grad_norm": grad_norm, "progress/tokens": num_tokens, "progress/done_frac": done / num_steps,
                "progress/epoch": done / (data.epoch_steps or num_steps), "time/step": seconds,
                "perf/train_tokens_per_second": now.num_tokens / seconds, "perf/peak_memory_gb": peak_memory_gb(),
            })  # fmt: skip
            if save_due:
                uri = trainer.save_state(f"{done:06d}", overwrite=True).result().path
                run.checkpoint(done, uri, loop={"tokens": num_tokens})
                last_save = time.monotonic()
            if in_flight is None and not final and not stop:
                last_end = time.monotonic()
                in_flight = submit(done)


@dataclass
class Submitted:
    """A step under way."""

    step: int
    gradient: Future[ForwardBackwardOutput]
    update: Future[OptimStepOutput]
    num_tokens: int


def mean_over_trained_tokens(batch: list[Datum]) -> list[Datum]:
    """The engine sums, the recipe averages: weights divided by their sum over the batch."""
    total = sum(float(d.loss_fn_inputs["weights"].sum()) for d in batch)
    return [Datum(d.model_input, {**d.loss_fn_inputs, "weights": d.loss_fn_inputs["weights"] / total}) for d in batch]


def every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0


def results(now: Submitted, rows: list[str]) -> tuple[float, float]:
    """(mean NLL per trained token, gradient norm). A step that went wrong names its rows; it moved no weight."""
    nll = now.gradient.result().metrics["loss:sum"]
    try:
        return nll, now.update.result().metrics["grad_norm:mean"]
    except FloatingPointError as error:
        shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        raise FloatingPointError(f"step {now.step + 1}: loss {nll}, {error}; rows {shown} (cook data show)") from error
