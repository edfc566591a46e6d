"""The tower's image processor, under the name that transformers saves."""

from diffenc.hosts.image_processor import TowerImageProcessor


class DiffEncImageProcessor(TowerImageProcessor):
    """RGB squares in [-1, 1]; see `TowerImageProcessor`. Neither torchvision nor a GPU is needed.

    Examples:
        >>> DiffEncImageProcessor(64)(picture, return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 64, 64])
    """
