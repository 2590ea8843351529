"""A harmfulness probe: a small network on the hidden states of an answer, which withholds an answer that it flags.

Source:
    Zou et al. 2024 (arXiv:2406.04313), Table 2: on one layer's state of every generated token, linear or an MLP of 64
    and 32, and the model refuses if any token is flagged. Deviations: the answer is withheld as a whole, as by a
    service that shows only what is finished; one that shows words as they come would have shown those in front of the
    flagged one. Tokens that end an answer, or that a caller put in front of it, are not looked at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mm_cb.core.checked import read_record
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.files import file_sha256, give_usual_modes, write_json
from mm_cb.core.folders import but_is
from mm_cb.core.reading import is_there
from mm_cb.core.seal import refuse_changed, sealed
from mm_cb.core.weights import refuse_cut
from mm_cb.models.adapters import WEIGHTS as ADAPTER_WEIGHTS
from mm_cb.models.chat import TokenRole
from mm_cb.models.fingerprint import fingerprint
from mm_cb.models.inputs import ModelInputs

if TYPE_CHECKING:
    from mm_cb.models.base import ChatModel

ProbeKind = Literal["linear", "mlp"]
INNER: dict[ProbeKind, tuple[int, ...]] = {"linear": (), "mlp": (64, 32)}
"""Widths of the layers between a state and its score."""
FILE, WEIGHTS = "probe.json", "probe.safetensors"


class Flagged(TypedDict):
    """How many rows that were not trained on a probe flags."""

    flagged: int
    of: int


class ProbeFile(TypedDict):
    """probe.json."""

    model: str
    """What it was trained on."""
    fingerprint: str
    """Of its weights."""
    adapter_sha256: str | None
    """Of the adapter that was on; None without."""
    layer: int
    """Hidden state that it reads: 0 = embeddings, k = output of block k - 1, the last one behind the final norm."""
    kind: str
    hidden_size: int
    threshold: float
    """A token with a higher score is flagged."""
    refusal: str
    """What stands in place of an answer that is withheld."""
    false_positive_rate: float
    """Share of benign rows that the threshold may flag."""
    benign: Flagged
    harmful: Flagged
    weights_sha256: NotRequired[str]
    """Of probe.safetensors; files of earlier versions have neither this nor a seal."""


class ProbeNetwork(nn.Module):
    """States ``(..., H)`` to scores ``(...)``, in float32: the log odds of a token of a harmful answer."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, kind: ProbeKind) -> None:
        """Draw weights from torch's global generator."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        widths = [hidden_size, *INNER[kind], 1]
        layers: list[nn.Module] = []
        for width, following in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width, following), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, states: Tensor) -> Tensor:
        """Scores of states, which are first brought to mean 0 and deviation 1 of those trained on."""
        return self.layers((states.float() - self.mean) / self.scale).squeeze(-1)


@dataclass(frozen=True)
class Probe:
    """A trained probe.

    Attributes:
        network: Gives scores.
        layer: The hidden state that it reads.
        threshold: A token with a higher score is flagged.
        refusal: What stands in place of an answer that is withheld.
    """

    network: ProbeNetwork
    layer: int
    threshold: float
    refusal: str

    def margins(self, states: Tensor) -> Tensor:
        """How far scores of states ``(..., H)`` lie above the threshold, ``(...)``: flagged where above 0."""
        return self.network.to(states.device)(states) - self.threshold

    def term(self, states: Tensor, mask: Tensor) -> Tensor:
        """Mean of softplus(margin) over the tokens with ``mask == 1``, ``(B,)``: near 0 where none is flagged.

        Args:
            states: ``(B, T, H)``, through which gradients go.
            mask: ``(B, T)``, or ``(1, T)`` for all rows.
        """
        return (functional.softplus(self.margins(states)) * mask).sum(dim=1) / mask.sum(dim=1)

    @torch.no_grad()
    def withheld(self, model: "ChatModel", inputs: ModelInputs, said: Sequence[Sequence[int]]) -> list[bool]:
        """Whether a token of each answer is flagged.

        Args:
            model: Who answered, in the state in which it did.
            inputs: What it was asked, padded on the left.
            said: Token ids of each answer, without the one that ends it.
        """
        width = max(map(len, said))
        if not width:
            return [False] * len(said)
        ids = torch.full((len(said), width), model.processor.tokenizer.pad_token_id, device=inputs.input_ids.device)
        real = torch.zeros_like(ids)
        for row, tokens in enumerate(said):
            ids[row, : len(tokens)], real[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype), 1
        pairs = ((inputs.input_ids, ids), (inputs.attention_mask, real), (inputs.roles, real * TokenRole.COMPLETION))
        whole = [torch.cat(pair, dim=1) for pair in pairs]
        states = states_of(
            model, replace(inputs, input_ids=whole[0], attention_mask=whole[1], roles=whole[2]), self.layer
        )
        flagged = (self.margins(states[:, -width:]) > 0) & real.bool()
        return flagged.any(dim=1).tolist()


def states_of(model: "ChatModel", inputs: ModelInputs, layer: int) -> Tensor:
    """The hidden states ``(B, T, H)`` of a batch at one layer, of all others none is kept."""
    with states_at(model, layer) as found:
        model.forward(inputs, logits_to_keep=1)
    return found[-1]


@contextmanager
def states_at(model: "ChatModel", layer: int) -> Iterator[list[Tensor]]:
    """The hidden states ``(B, T, H)`` at one layer of every pass inside, with their gradients."""
    last = layer == len(model.decoder_blocks)
    place: Any = model.final_norm if last else model.decoder_blocks[layer - 1]
    found: list[Tensor] = []

    def catch(module: Any, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = place.register_forward_hook(catch)
    try:
        yield found
    finally:
        hook.remove()


def save_probe(folder: Path, network: ProbeNetwork, told: ProbeFile) -> None:
    """Write both files of a probe, sealed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    give_usual_modes(folder)
    write_json(folder / FILE, sealed({**told, "weights_sha256": file_sha256(folder / WEIGHTS)}))


def adapter_sha256(adapter: str | Path | None) -> str | None:
    """What tells an adapter by its content; None without one."""
    return None if adapter is None else file_sha256(Path(adapter) / ADAPTER_WEIGHTS)


def load_probe(folder: Path, model: "ChatModel", adapter: str | Path | None) -> Probe:
    """Read a probe for the model that it was trained on.

    Args:
        folder: What ``mm-cb probe`` wrote.
        model: Who is to be watched, loaded by name.
        adapter: The adapter's folder that is on; None without.

    Raises:
        UserError: If it is no probe, damaged, or one of another model or adapter.
    """
    if not is_there(folder / FILE):
        raise UserError(f"`{folder}` must be what `mm-cb probe` wrote, but it holds no {FILE}{but_is(folder)}.")
    told = read_record(folder / FILE, ProbeFile)
    refuse_changed(told, f"`{folder / FILE}`", needed="weights_sha256" in told)
    kind: Any = told["kind"]
    if kind not in get_args(ProbeKind):
        raise unknown(f"`kind` of `{folder / FILE}`", str(kind), get_args(ProbeKind))
    _refuse_others(folder, told, model, adapter)
    hidden, blocks = model.base.config.get_text_config().hidden_size, len(model.decoder_blocks)
    if told["hidden_size"] != hidden or not 1 <= told["layer"] <= blocks:
        raise UserError(
            f"the probe in `{folder}` reads {told['hidden_size']} numbers at layer {told['layer']}, `{model.name}` has "
            f"{hidden} at layers 1 to {blocks}; give a probe that was trained on this model."
        )
    network = ProbeNetwork(hidden, kind)
    try:
        refuse_cut(folder / WEIGHTS)
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"`{folder / WEIGHTS}` must hold the tensors of a {kind} probe: {error}") from error
    if told.get("weights_sha256", digest := file_sha256(folder / WEIGHTS)) != digest:
        raise UserError(f"`{folder / WEIGHTS}` was changed after it was written; train the probe again.")
    if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
        raise UserError(f"`{folder / WEIGHTS}` must hold finite numbers; train the probe again.")
    return Probe(network.eval().requires_grad_(False), told["layer"], told["threshold"], told["refusal"])


def _refuse_others(folder: Path, told: ProbeFile, model: "ChatModel", adapter: str | Path | None) -> None:
    """Refuse a probe of other states than these."""
    here = fingerprint(model.name)
    if here and here != told["fingerprint"]:
        raise UserError(
            f"the probe in `{folder}` was trained on other weights (`{told['model']}`) than those of `{model.name}`; "
            "give the model it was trained on, or train one: `mm-cb probe`."
        )
    if told["adapter_sha256"] != adapter_sha256(adapter):
        trained = "with another adapter" if told["adapter_sha256"] and adapter else "without an adapter"
        trained = "with an adapter" if told["adapter_sha256"] and not adapter else trained
        raise UserError(
            f"the probe in `{folder}` was trained on `{told['model']}` {trained}; give that, or train one on this: "
            "`mm-cb probe RECIPE" + (" --adapter A" if adapter else "") + "`."
        )
