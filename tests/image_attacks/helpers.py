import torch

from image_attacks import ExactPreprocessing

PINPOINTS = [[42, 84], [84, 42], [84, 84]]


def build_processor(backend, tile=42, pinpoints=PINPOINTS, **settings):
    from transformers.models.llava_next import image_processing_llava_next, image_processing_pil_llava_next

    kinds = {
        "pil": image_processing_pil_llava_next.LlavaNextImageProcessorPil,
        "torchvision": image_processing_llava_next.LlavaNextImageProcessor,
    }
    sizes = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    return kinds[backend](**(sizes | {"image_grid_pinpoints": pinpoints} | settings))


def eight_bit(shape, generator):
    return torch.randint(0, 256, shape, generator=generator) / 255


def any_resolution(processor, size):
    """A preprocessing of two views: one resize alone, and one resize with padding, cut into tiles."""
    from mm_cb.models import llava_next

    return ExactPreprocessing(processor, size, llava_next.next_plan(processor, size))
