"""A GGUF file as a folder in safetensors, with its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import give_usual_modes


def convert(gguf: Path, out: Path) -> None:
    """Write the weights of a Llama, dequantised and in bfloat16, as transformers lays them out.

    Quantised weights are not mended by it: they have the values that the file's few bits stand for.

    Args:
        gguf: The file.
        out: A new folder.

    Raises:
        UserError: If transformers cannot read the file.
    """
    import torch

    from mm_cb.models.loading import quiet_libraries

    with quiet_libraries():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        folder, name = str(gguf.parent), gguf.name
        try:
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        except Exception as error:  # whatever a library makes of a damaged file, it is the file's
            raise UserError(f"cannot read `{gguf}` as a GGUF file: {one_line(str(error))}") from error
        fields = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        with torch.device("meta"):
            plain: Any = LlamaForCausalLM(LlamaConfig(**fields))
        plain.load_state_dict(read.to(torch.bfloat16).state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    give_usual_modes(out)
