"""What an attack asks of a Hugging Face LLaVA-NeXT, computing only what the answer depends on.

The same numbers as the whole model gives, for less work: the image tower stops at the layer that is used, and the
last block turns to the positions that are looked at (:func:`only_last_positions`). :class:`LlavaNextTargets` is a
target loss on top: tokens that all chats share are run once (for one image against many targets that is nearly
everything), and logits are made at target positions only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .objectives import IGNORED_LABEL, predicted_nll

PLAIN_BLOCKS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
"""Decoder blocks whose keys and values are computed as :func:`_keys_and_values` does."""


class LlavaNextTargets:
    """Mean negative log-likelihood of each chat's target, as a function of ``pixel_values``.

    >>> loss = LlavaNextTargets(model, prompts, targets, (672, 672))                  # doctest: +SKIP
    >>> preprocess = LlavaNextPreprocessing(processor.image_processor, (672, 672))    # doctest: +SKIP
    >>> pgd(lambda pixels: loss(preprocess(pixels)), images, threat_model=Linf(8 / 255))   # doctest: +SKIP
    """

    def __init__(
        self, model: Any, prompts: Sequence[Tensor], targets: Sequence[Tensor], image_size: tuple[int, int]
    ) -> None:
        """Split the chats into what they share and what is their own.

        Args:
            model: A ``LlavaNextForConditionalGeneration`` (adapters inside it are used), in evaluation mode.
            prompts: M rows of token ids, 1-D, up to where the model answers, with the image's placeholder tokens as
                the processor writes them. Up to the image all rows must agree.
            targets: M rows of token ids to be said there, 1-D.
            image_size: Height and width of the images, which the model needs to unpad their tiles.

        Raises:
            ValueError: If the rows do not fit together, a target is empty, or the model is in training mode.
        """
        if model.training:
            raise ValueError("`model` must be in evaluation mode (dropout off), call `model.eval()`.")
        if len(prompts) != len(targets) or not prompts or any(len(target) == 0 for target in targets):
            raise ValueError(
                f"`targets` must hold one non-empty row per prompt, got {len(targets)} for {len(prompts)} prompts."
            )
        self._model, self._image_size = model, image_size
        device = model.get_input_embeddings().weight.device
        shared = _shared_length(prompts)
        image_token = model.config.image_token_id
        if not bool((prompts[0] == image_token).any()) or any((row[shared:] == image_token).any() for row in prompts):
            raise ValueError("`prompts` must agree up to the end of the image's tokens, and each must hold one image.")
        self._context = prompts[0][:shared].to(device)
        self._image_tokens = int((prompts[0] == image_token).sum())
        tails = [torch.cat([p[shared:], t[:-1]]) for p, t in zip(prompts, targets, strict=True)]
        self._tails = nn.utils.rnn.pad_sequence(list(tails), batch_first=True).to(device)
        self.labels = nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=IGNORED_LABEL).to(device)
        """Target tokens, -100 behind a row's last, shape ``(M, K)``."""
        first = torch.tensor([len(p) - shared - 1 for p in prompts]).view(-1, 1)
        places = first + torch.arange(self.labels.shape[1])
        self._places = places.clamp(max=self._tails.shape[1] - 1).to(device)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Return the losses ``(M,)``, float32.

        Args:
            pixel_values: M images' views ``(M, tiles, 3, h, w)``, or one image's ``(1, tiles, 3, h, w)`` for all
                chats.
        """
        return predicted_nll(self.logits(pixel_values), self.labels)

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Return the logits that predict :attr:`labels`, shape ``(M, K, V)``."""
        from transformers import DynamicCache

        count = len(self._tails)
        if pixel_values.ndim != 5 or len(pixel_values) not in (1, count):
            raise ValueError(
                f"`pixel_values` must have shape (1 or {count}, tiles, 3, h, w), got {tuple(pixel_values.shape)}."
            )
        language, embed = self._model.model.language_model, self._model.get_input_embeddings()
        # A new cache at every call: a cache that is handed over twice grows.
        cache = DynamicCache(config=language.config)
        with only_last_positions(self._model, 0):
            language(inputs_embeds=self._embed_context(pixel_values), past_key_values=cache, use_cache=True)
        if len(pixel_values) < count:
            cache.batch_repeat_interleave(count)
        states = language(inputs_embeds=embed(self._tails), past_key_values=cache, use_cache=True).last_hidden_state
        wanted = states.gather(1, self._places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        return self._model.lm_head(wanted)

    def _embed_context(self, pixel_values: Tensor) -> Tensor:
        sizes = torch.tensor([self._image_size] * len(pixel_values))
        pixel_values = pixel_values.to(self._model.dtype)
        features = torch.cat(list(self._model.get_image_features(pixel_values, sizes).pooler_output))
        ids = self._context.expand(len(pixel_values), -1)
        embeds = self._model.get_input_embeddings()(ids)
        place = (ids == self._model.config.image_token_id).unsqueeze(-1)
        expected, got = self._image_tokens, len(features) // len(pixel_values)
        if expected != got:
            raise ValueError(f"`prompts` hold {expected} image tokens, but images of {self._image_size} make {got}.")
        return embeds.masked_scatter(place, features.to(embeds.dtype))


def _shared_length(prompts: Sequence[Tensor]) -> int:
    """Return how many tokens all prompts begin with; the last token of each stays out, since it predicts."""
    shortest = min(len(row) for row in prompts)
    same = torch.stack([row[:shortest] for row in prompts])
    differs = (same != same[0]).any(dim=0).nonzero()
    return min(int(differs[0]) if len(differs) else shortest, shortest - 1)


@contextmanager
def only_last_positions(model: Any, count: int) -> Iterator[None]:
    """Run a model for what it says at the last ``count`` positions alone; those are equal to the whole model's.

    Inside, the last decoder block computes keys and values everywhere but the rest (queries, attention, feed-forward)
    at these positions only, so that its output is ``(B, count, D)``; give the model the same ``logits_to_keep``. Layers
    of the image tower behind the one that is used do nothing. Rows are padded on the left, if at all. With ``count=0``
    the last block only fills the cache that is passed in. Saves about 3 % of a forward and backward pass at 7B.

    A last block that is not Llama's, Mistral's or Qwen2's, or whose attention is neither "sdpa" nor "eager", runs
    whole, and so does an image tower that is neither CLIP's nor built like it.

    Args:
        model: A ``LlavaNextForConditionalGeneration``, perhaps with adapted layers in it, in evaluation mode.
        count: Positions that are looked at, counted from the end.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("`model` must be in evaluation mode (dropout off), call `model.eval()`.")
    tower, language = model.model.vision_tower, model.model.language_model
    with ExitStack() as undo:
        layers = getattr(getattr(tower, "encoder", None), "layers", [])
        for unused in layers[_used_layers(model.config.vision_feature_layer, len(layers)) :]:
            undo.enter_context(_instead_of(unused, lambda hidden_states, *_, **__: hidden_states))
        block = language.layers[-1]
        if type(block).__name__ in PLAIN_BLOCKS and language.config._attn_implementation in ("sdpa", "eager"):
            whole = block.forward
            undo.enter_context(_instead_of(block, lambda *a, **kw: _last_positions(block, whole, count, *a, **kw)))
        yield


@contextmanager
def _instead_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace what a module computes; its hooks (of transformers, which collect hidden states) go on as before."""
    own = module.__dict__.get("forward")  # there may be one already: accelerate places modules on devices that way
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _used_layers(feature_layer: int | list[int], layers: int) -> int:
    """Return how many layers of the image tower its features depend on; ``hidden_states[0]`` is what the first gets."""
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(index if index >= 0 else layers + 1 + index for index in chosen)


def _last_positions(
    block: Any,
    whole: Callable[..., Tensor],
    count: int,
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **further: Any,
) -> Tensor:
    """Run a decoder block at its last ``count`` positions; the earlier ones enter through a cache of their keys."""
    from transformers import DynamicCache

    length = hidden_states.shape[1]
    earlier = length - count
    if past_key_values is None:
        past_key_values = DynamicCache()  # without a config: a sliding window is the mask's business here
    if earlier > 0:
        angles = tuple(angle[:, :earlier] for angle in position_embeddings)
        keys, values = _keys_and_values(block, hidden_states[:, :earlier], angles)
        past_key_values.update(keys, values, block.self_attn.layer_idx)
    if count == 0:
        return hidden_states[:, :0]
    if attention_mask is None:  # stands for "causal, no padding", which is read otherwise where queries are fewer
        places = torch.arange(length, device=hidden_states.device)
        attention_mask = (places[:, None] >= places)[None, None]
    return whole(
        hidden_states[:, -count:],
        attention_mask=attention_mask[:, :, -count:],
        position_embeddings=tuple(angle[:, -count:] for angle in position_embeddings),
        position_ids=None if position_ids is None else position_ids[:, -count:],
        past_key_values=past_key_values,
        **further,
    )


def _keys_and_values(block: Any, hidden_states: Tensor, angles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a decoder block's keys, rotated, and values: shape ``(B, heads, T, D)`` each."""
    attention = block.self_attn
    states = block.input_layernorm(hidden_states)
    heads = (*states.shape[:-1], -1, attention.head_dim)
    keys, values = (project(states).view(heads).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    cos, sin = (angle.unsqueeze(1).to(keys.device) for angle in angles)  # accelerate may have moved this block alone
    one, two = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-two, one], dim=-1) * sin, values
