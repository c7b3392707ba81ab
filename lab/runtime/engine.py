"""The core's own answer to every action: build, train, evaluate, generate. A plugin like any other, and the last.

Only the order of the calls stands here; the mathematics is in ``lab.projects``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lab.context import IGNORED, Batch, Clip, Run, Step
from lab.files import CHECKPOINT
from lab.projects.backprop.component import AdamW, clip_gradients
from lab.projects.decoder.component import Decoder
from lab.projects.fine_tuning.component import add_lora
from lab.projects.kv_cache.component import Cache
from lab.projects.losses.component import cross_entropy
from lab.projects.pretraining.component import Tokenizer, capture, restore, save_checkpoint
from lab.projects.residuals.component import Choices
from lab.runtime.data import Source, Tokens, make_source
from lab.runtime.schedule import advance, make_scheduler
from lab.runtime.tasks import split_rows
from lab.sites import sites_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from lab.diagnosis.model import Diagnosis
    from lab.runtime.start import Start
    from lab.scenario import Scenario
    from lab.session import Session

HELD_OUT_BATCHES = 4
SAMPLE_LENGTH = 80


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while in the block; then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Engine:
    """Runs a scenario, watched by a session.

    Args:
        scenario: What to train, on what, for how long.
        session: Records and judges.
        start: The trained model to begin with, if not with a new one.
        resumed: The checkpoint of this run from which to go on.

    Attributes:
        cached: Whether generation keeps keys and values.
    """

    cached = True

    def __init__(
        self, scenario: Scenario, session: Session, start: Start | None = None, resumed: dict[str, Any] | None = None
    ) -> None:
        self.scenario, self.session, self.start, self.resumed = scenario, session, start, resumed
        self._draw = torch.Generator()  # of its own: sampling must not change what training draws

    # ---------------------------------------------------------------- scopes

    def lab_run(self, run: Run) -> Diagnosis:
        """Build, train, evaluate, generate, diagnose."""
        torch.manual_seed(run.seed)
        run.data = run.hook.lab_build_data(run=run)
        run.model = run.hook.lab_build_model(run=run).to(run.device)
        sites = sites_of(run.model)
        sites.output = "head.out"
        run.attach(run.model, run.hook.lab_build_optimizer(run=run), sites)
        run.scheduler = make_scheduler(self.scenario, run.optimizer)
        self.session.start()
        begin = self._resume(run)
        last = self.scenario.steps - 1
        for index in range(begin, self.scenario.steps):
            step = Step(index)
            self.session.begin_step(step)
            run.hook.lab_step(run=run, step=step)
            if index == last or (self._evaluate_every and (index + 1) % self._evaluate_every == 0):
                run.hook.lab_evaluate(run=run, step=Step(index, mode="evaluate"))
            self.session.end_step(step)
            self._checkpoint(run, index)
        self._sample(run, Step(last, mode="generate"))
        return self.session.finish()

    @property
    def _evaluate_every(self) -> int:
        return self.scenario.train.evaluate_every

    def lab_step(self, run: Run, step: Step) -> bool:
        """One training step. A batch that passes in parts gives the gradient that it gives as a whole."""
        hook = run.hook
        hook.lab_zero_grad(run=run, step=step)
        batch = hook.lab_batch(run=run, step=step)
        step.parts = self.scenario.train.accumulate
        parts = split_rows(batch, step.parts, "train.accumulate")
        shares: list[Tensor | None] = [None] if len(parts) == 1 else [*self.shares(parts)]
        losses: list[Tensor] = []
        for i, share in enumerate(shares):
            step.part, step.batch = i, parts[i]
            step.logits = hook.lab_forward(run=run, step=step)
            loss = hook.lab_loss(run=run, step=step)
            step.loss = loss if share is None else loss * share
            hook.lab_backward(run=run, step=step)
            losses.append(step.loss)
        step.loss = losses[0] if len(losses) == 1 else torch.stack([loss.detach() for loss in losses]).sum()
        step.grad_norm = hook.lab_clip(run=run, step=step)
        step.clips.append(Clip(tuple(run.parameters.values()), self.scenario.train.clip, step.grad_norm))
        step.lr = hook.lab_schedule(run=run, step=step)
        self.session.before_update(step)
        hook.lab_update(run=run, step=step)
        return True

    def shares(self, parts: list[Batch]) -> list[Tensor]:
        """The share of each part in the mean over the whole batch: by targets that count, or by rows for pairs."""
        if self.scenario.train.objective == "dpo":
            return [torch.ones(()) / len(parts)] * len(parts)
        counted = []
        for part in parts:
            assert part.targets is not None
            counted.append((part.targets != IGNORED).sum())
            # A mean over no target is NaN, and 0 times NaN too: such a part gets any targets, to be counted 0 times.
            part.targets = torch.where(counted[-1] == 0, torch.zeros_like(part.targets), part.targets)
        counts = torch.stack(counted)
        return list(counts / counts.sum().clamp_min(1))

    def _resume(self, run: Run) -> int:
        """Put back what a checkpoint holds; return the step to go on with. An empty one is that of step 0."""
        if self.resumed is None:
            return 0
        begin = restore(self.resumed, run.model, run.optimizer) if self.resumed else 0
        if begin and run.scheduler is not None:
            run.scheduler.load_state_dict(self.resumed["scheduler"])
        self.session.resume(begin, self.resumed.get("session", {}))
        return begin

    def _checkpoint(self, run: Run, index: int) -> None:
        """Save all that the next step depends on, whole or not at all."""
        every = self.scenario.train.checkpoint_every
        if every and (index + 1) % every == 0:
            self.session.store.commit()  # what is recorded must not be behind the checkpoint
            state = capture(run.model, run.optimizer, index + 1)
            assert run.scheduler is not None
            state |= {"session": self.session.state(), "scheduler": run.scheduler.state_dict()}
            save_checkpoint(run.folder / CHECKPOINT, state)

    @torch.no_grad()
    def lab_evaluate(self, run: Run) -> Tensor:
        """The mean loss over a few held-out batches, in evaluation mode."""
        losses = []
        with evaluating(run.model), run.sites.running("evaluate"):
            for i in range(HELD_OUT_BATCHES):
                part = Step(i, mode="evaluate")
                part.batch = run.hook.lab_batch(run=run, step=part)
                part.logits = run.hook.lab_forward(run=run, step=part)
                losses.append(run.hook.lab_loss(run=run, step=part))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def lab_generate(self, run: Run, step: Step, prompt: Tensor, length: int) -> Tensor:
        """Sample token by token, from as much of the past as the context holds.

        Until the context is full, a cache keeps what was computed. From there on the window slides, every position
        is another one than before, and nothing that is kept would be right.
        """
        tokens = fresh = prompt
        self._draw.manual_seed(run.seed)
        m = self.scenario.model
        cache = Cache(m.layers, m.context) if self.cached and m.mixer == "attention" and m.layers else None
        with self.generating(run):
            for _ in range(length):
                if cache is not None and cache.length + fresh.shape[1] <= m.context:
                    step.batch = Batch((fresh,), {"cache": cache})
                else:
                    step.batch = Batch((tokens[:, -m.context :],))
                step.logits = run.hook.lab_forward(run=run, step=step)
                fresh = run.hook.lab_next_token(run=run, step=step)  # [B 1]
                tokens = torch.cat([tokens, fresh], dim=1)  # [B T+1]
        return tokens

    @contextmanager
    def generating(self, run: Run) -> Iterator[None]:
        """Evaluation mode, with the taps told what the model is called for."""
        with evaluating(run.model), run.sites.running("generate"):
            yield

    def _sample(self, run: Run, step: Step) -> None:
        """Let the trained model write a little, as a reader's own check."""
        prompt = run.data.prompt().to(run.device)  # [1 T]
        tokens = run.hook.lab_generate(run=run, step=step, prompt=prompt, length=SAMPLE_LENGTH)
        # A model may have more classes than there are tokens.
        self.session.fact("sample", run.data.decode([t for t in tokens[0].tolist() if t < run.data.vocabulary]))

    # ---------------------------------------------------------------- what objectives take over

    def make_source(self, run: Run) -> Source:
        """The source that the scenario names, read with the tokens of the model that it starts from."""
        tokenizer = self.start.tokenizer if self.start else None
        return make_source(self.scenario.data, self.scenario.model.context, run.seed, tokenizer)

    def make_tokenizer(self) -> Tokens:
        """The tokens of the model that this starts from; else bytes."""
        return self.start.tokenizer if self.start else Tokenizer([])

    def make_model(self, run: Run) -> nn.Module:
        """A decoder of the scenario's size: new, or as trained before, with adapters where they are asked for."""
        m = self.scenario.model
        choices = Choices(m.mixer, m.kv_heads, m.positions, m.norm, m.norm_at, m.activation, m.dropout)
        size = {"context": m.context, "layers": m.layers, "width": m.width, "heads": m.heads}
        model = Decoder(run.data.vocabulary, **size, tied=m.tied, choices=choices)
        if self.start:
            model.load_state_dict(self.start.weights)
        if self.scenario.train.lora_rank:
            add_lora(model, self.scenario.train.lora_rank)
        return model

    # ---------------------------------------------------------------- actions

    def lab_build_data(self, run: Run) -> Source:
        """The source that the scenario names."""
        return self.make_source(run)

    def lab_build_model(self, run: Run) -> nn.Module:
        """A decoder of the scenario's size."""
        return self.make_model(run)

    def lab_build_optimizer(self, run: Run) -> Optimizer:
        """AdamW, with decay on matrices only: a norm's gain or a bias has nothing to be decayed to."""
        params = [p for p in run.model.parameters() if p.requires_grad]
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]
        t = self.scenario.train
        groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW(groups, lr=t.lr)

    def lab_zero_grad(self, run: Run) -> bool:
        """Drop the gradients of the step before."""
        run.optimizer.zero_grad(set_to_none=True)
        return True

    def lab_batch(self, run: Run, step: Step) -> Batch:
        """The batch of this step, moved to the device."""
        batch: Batch = run.data.batch(step.index, "train" if step.mode == "train" else "held-out")
        args = tuple(a.to(run.device, non_blocking=True) for a in batch.args)
        targets = None if batch.targets is None else batch.targets.to(run.device, non_blocking=True)
        return Batch(args, targets=targets)

    def lab_forward(self, run: Run, step: Step) -> Tensor:
        """Call the model."""
        assert step.batch is not None
        return run.call(step.batch)

    def lab_loss(self, step: Step) -> Tensor:
        """Cross-entropy, in nats a token."""
        assert step.logits is not None
        assert step.batch is not None
        assert step.batch.targets is not None
        return cross_entropy(step.logits, step.batch.targets)

    def lab_backward(self, step: Step) -> bool:
        """Propagate backward."""
        assert step.loss is not None
        step.loss.backward()  # type: ignore[no-untyped-call]
        return True

    def lab_clip(self, run: Run) -> Tensor:
        """Clip by the joint norm."""
        return clip_gradients(run.parameters.values(), self.scenario.train.clip)

    def lab_schedule(self, run: Run, step: Step) -> float:
        """Step the schedule, which stands at the first step when it is made; answer the rate."""
        assert run.scheduler is not None
        if step.index:
            advance(run.scheduler)
        return float(run.optimizer.param_groups[0]["lr"])

    def lab_update(self, run: Run) -> bool:
        """Let the optimiser step."""
        run.optimizer.step()
        return True

    def lab_next_token(self, step: Step) -> Tensor:
        """Sample from the softmax of the last logits, by a generator that starts from the run's seed."""
        assert step.logits is not None
        last = step.logits[:, -1].float()  # [B V]
        probabilities = torch.softmax(torch.nan_to_num(last), dim=-1).cpu()
        return torch.multinomial(probabilities, 1, generator=self._draw).to(last.device)
