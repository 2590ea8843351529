"""One step of the released circuit-breaker trainer, written from its description, as a yardstick.

Source: the loss of GraySwanAI/circuit-breakers (readable in SchwinnL/circuit-breakers-eval, src/), text trainer, with
pictures passed on: four passes with the head, the language model cut to the top target + 1 blocks, every hidden state
kept, the retain loss averaged over all states and all positions of the padded batch, the reroute loss over the valid
tokens of the target layers. The weights are arguments: its schedule counts micro-batches and divides by 300.
"""

import torch


def cut_language_model(model, target_layers):
    """Keep blocks 0..max(target_layers) of a transformers LLaVA-NeXT, final norm and head in place."""
    tower = model.model.language_model
    tower.layers = tower.layers[: max(target_layers) + 1]
    tower.config.num_hidden_layers = max(target_layers) + 1


def released_states(peft_model, kwargs):
    """All hidden states of one batch with the adapter off (no gradient) and on, each by a whole pass with the head."""
    with peft_model.disable_adapter(), torch.no_grad():
        old = peft_model(**kwargs, output_hidden_states=True, use_cache=False).hidden_states
    return old, peft_model(**kwargs, output_hidden_states=True, use_cache=False).hidden_states


def released_retain_loss(new, old, attention_mask):
    """Its retain loss of states ``(L, B, T, H)``: padding is zeroed, and then counts in the mean."""
    valid = attention_mask[None, :, :, None]
    per_position = ((new * valid - old * valid).float() ** 2).sum(-1)
    return torch.where(per_position > 0, per_position, 1).sqrt().where(per_position > 0, 0).mean()


def released_loss(peft_model, circuit_breaker, retain, target_layers, reroute_weight, retain_weight):
    """The loss of one step; both batches are keyword arguments of the model, attention mask included."""
    old_retain, new_retain = map(torch.stack, released_states(peft_model, retain))
    old_harmful, new_harmful = released_states(peft_model, circuit_breaker)

    retain_term = released_retain_loss(new_retain, old_retain, retain["attention_mask"])

    valid = circuit_breaker["attention_mask"]
    cosines = []
    for layer in target_layers:
        new, old = new_harmful[layer].float(), old_harmful[layer].float()
        unit = (new / (new**2).sum(-1, keepdim=True).sqrt()) * (old / (old**2).sum(-1, keepdim=True).sqrt())
        cosines.append((unit.sum(-1) * valid).clamp(min=0))
    reroute_term = torch.stack(cosines).sum() / (valid.sum() * len(target_layers))
    return reroute_weight * reroute_term + retain_weight * retain_term
