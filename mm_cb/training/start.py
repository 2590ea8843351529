"""How a run starts: how long target states are, how far a random B moves them, and how steep both losses are there.

At B = 0 adapted and base states are the same: the cosine has no slope there, and near it one that goes like the
distance over the states' length. The slope of the retain loss is the same everywhere. So whether rerouting gets away
from its start at all hangs on the length of states, unless a run starts at a distance that is a part of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_cb.core.errors import UserError
from mm_cb.data.examples import SETS
from mm_cb.training.batches import Batch, SetRows, split_batch
from mm_cb.training.hidden_states import adapted_states, target_states
from mm_cb.training.losses import retain_positions
from mm_cb.training.objective import TrainingObjective

STEP_DISTANCE = 200.0
"""A first step of B by the sign of the reroute gradient moves target states by the learning rate times this, in parts
of their length: by 2 % at 1e-4. B's own learning rate is chosen so."""
START_ROWS = 8
"""Pairs of a modality that are measured."""
_NORM = "start_norm_"
_FIRST = 1e-3
_TRIES = 16
_CLOSE = 0.02


class FirstMeasurements:
    """The measurements before a run's first step, on rows that it trains on."""

    def __init__(self, objective: TrainingObjective, batches: Sequence[Batch], tokens_per_pass: int, seed: int) -> None:
        """Take a model with a fresh adapter.

        Args:
            objective: Its losses.
            batches: Rows of each modality, collated.
            tokens_per_pass: How many go through the model at once.
            seed: Decides the random B.
        """
        self._objective, self._seed = objective, seed
        self._parts = [part for batch in batches for part in split_batch(batch, tokens_per_pass)]
        average = objective.options.retain_average
        self._counts = {
            "circuit_breaker": torch.stack([batch["circuit_breaker"]["mask"].sum() for batch in batches]).sum(),
            "retain": torch.stack([retain_positions(batch["retain"]["mask"], average) for batch in batches]).sum(),
        }

    def measure(
        self, distance: float, learning_rate: float, agree: Callable[[float], float] = lambda value: value
    ) -> dict[str, float]:
        """Put B where the run starts, and measure there.

        Args:
            distance: How far target states are to be from the base's, in parts of their length; 0 leaves B at 0, and
                the gradients, which are 0 there, are measured where a first step might lead: at a random B of one
                learning rate.
            learning_rate: The run's.
            agree: What several processes take for the B that each of them found.

        Returns:
            ``start_norm_K``: median length of base states at target K, over counted tokens of both sets.
            ``start_distance``: of adapted states to them, as a part of their length. ``start_b``: root mean square of
            B; ``start_b_rate``: its learning rate. ``start_reroute_gradient``, ``start_retain_gradient``: length of
            each loss's gradient, without its weight.

        Raises:
            UserError: If states or gradients are not finite.
        """
        norms, _ = self._states()
        for layer, norm in norms.items():
            if not math.isfinite(norm) or not norm:
                raise UserError(
                    f"hidden states at target layer {layer} must have a finite length above 0, got {norm}; the model's "
                    "weights are damaged, or `dtype` is too narrow for them: try dtype=float32."
                )
        with torch.random.fork_rng(devices=_devices(self._objective.model.device)):
            torch.manual_seed(self._seed)
            scale = agree(self._search(self._put, distance)) if distance else learning_rate
            self._put(scale)
            moved = self._states()[1] if distance else 0.0
            slopes = {name: self._gradient(name) for name in SETS}
            rate = learning_rate
            if distance:
                rate = agree(self._rate(learning_rate * STEP_DISTANCE))
            else:
                self._put(0.0)
        for name, slope in slopes.items():
            if not math.isfinite(slope):
                raise UserError(f"the gradient of the {name} loss must be finite before the first step, got {slope}.")
        return {
            **{f"{_NORM}{layer}": norm for layer, norm in norms.items()},
            "start_distance": moved,
            "start_b": scale if distance else 0.0,
            "start_b_rate": rate,
            "start_reroute_gradient": slopes["circuit_breaker"],
            "start_retain_gradient": slopes["retain"],
        }

    def _search(self, move: Callable[[float], None], distance: float, of: Sequence[Tensor] | None = None) -> float:
        """How much of a move takes states so far; near 0 the distance is in proportion to it."""
        scale = _FIRST
        for _ in range(_TRIES):
            move(scale)
            moved = self._states(of)[1]
            if abs(moved / distance - 1) < _CLOSE:
                break
            factor = distance / moved if moved > 0 else 100.0
            scale *= min(max(factor, 0.01), 100.0) if math.isfinite(factor) else 0.01
        return scale

    def _rate(self, distance: float) -> float:
        """The step of B, down the sign of the reroute gradient, that moves states so far from where they are."""
        self._gradient("circuit_breaker", keep=True)
        places = [(weight, weight.detach().clone()) for weight in matrices_b(self._objective.model.model)]
        signs = [torch.zeros_like(held) if weight.grad is None else weight.grad.sign() for weight, held in places]

        @torch.no_grad()
        def move(step: float) -> None:
            for (weight, held), sign in zip(places, signs, strict=True):
                weight.copy_(held - step * sign)

        step = self._search(move, distance, self._adapted())
        move(0.0)
        self._forget()
        return step

    @torch.no_grad()
    def _put(self, scale: float) -> None:
        """B as the seed draws it, of this root mean square."""
        generator = torch.Generator().manual_seed(self._seed)
        for weight in matrices_b(self._objective.model.model):
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))

    @torch.no_grad()
    def _adapted(self) -> list[Tensor]:
        """Adapted states at the targets, of counted tokens, part by part."""
        found = []
        for _, given in self._sets():
            rows = self._objective.rows(given)
            found.append(adapted_states(self._objective.model, rows, *self._objective.layers)[:, rows.mask.bool()])
        return found

    @torch.no_grad()
    def _states(self, of: Sequence[Tensor] | None = None) -> tuple[dict[int, float], float]:
        """Median length of base states at each target, and mean distance, as a part of it, of adapted ones.

        Args:
            of: What the distance is from, part by part; None = from the base's states.
        """
        lengths, moved = list[Tensor](), list[Tensor]()
        for number, (_, given) in enumerate(self._sets()):
            rows = self._objective.rows(given)
            states = target_states(self._objective.model, rows, *self._objective.layers)
            adapted, reference = (side[:, rows.mask.bool()].float() for side in states)
            lengths.append(reference.norm(dim=-1))
            start = reference if of is None else of[number].float()
            moved.append((adapted - start).norm(dim=-1) / lengths[-1])
        medians = torch.cat(lengths, dim=1).median(dim=1).values.tolist()
        return dict(zip(self._objective.layers[1], medians, strict=True)), float(torch.cat(moved, dim=1).mean())

    def _gradient(self, chosen: str, keep: bool = False) -> float:
        """Length of a loss's gradient, which stays in the weights if it is to be kept."""
        for name, given in self._sets():
            if name == chosen == "retain":
                self._objective.retain(given, self._counts[name]).backward()
            elif name == chosen:
                self._objective.reroute(given, self._counts[name], 0)[0].backward()
        gradients = [weight.grad for weight in self._objective.model.model.parameters() if weight.grad is not None]
        total = sum(float(gradient.float().square().sum()) for gradient in gradients)
        if not keep:
            self._forget()
        return math.sqrt(total)

    def _forget(self) -> None:
        for weight in self._objective.model.model.parameters():
            weight.grad = None

    def _sets(self) -> Iterator[tuple[str, SetRows]]:
        for part in self._parts:
            name = "retain" if "retain" in part else "circuit_breaker"
            yield name, part[name]  # type: ignore[literal-required]


def start_lines(record: Mapping[str, float | str]) -> list[str]:
    """What `Start.measure` found, in words; nothing of a record without it."""
    if "start_b" not in record:
        return []
    norms = ", ".join(
        f"{float(value):.4g} at {key.removeprefix(_NORM)}" for key, value in record.items() if key.startswith(_NORM)
    )
    reroute, retain = (float(record[f"start_{name}_gradient"]) for name in ("reroute", "retain"))
    moved, scale = float(record["start_distance"]), float(record["start_b"])
    rate = float(record["start_b_rate"])
    where = "B is 0"
    if scale:
        where = f"B of root mean square {scale:.3g} moves them by {moved:.3g} of that, its learning rate is {rate:.3g}"
    beside = "" if scale else ", at a random B of one learning rate"
    return [
        f"Before the first step: median length of the base's states {norms}; {where}",
        f"Gradients there, without their weights{beside}: reroute loss {reroute:.3g}, retain loss {retain:.3g}",
    ]


def matrices_b(model: nn.Module) -> list[nn.Parameter]:
    """LoRA's B of every module, in the model's order."""
    return [weight for name, weight in model.named_parameters() if "lora_B" in name.split(".")]


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
