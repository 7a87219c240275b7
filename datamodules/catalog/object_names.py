"""Names of classes and connections of keypoints of the catalog's datasets, which need not be installed."""

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from datamodules.catalog.catalog import catalog

COCO_CATEGORIES = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id; "N/A" for gaps


def declared_classes(spec: str, category_ids: bool, persons: bool) -> tuple[str, ...]:
    """Return the names of the labels 1, 2, ... of a dataset of the catalog, which need not be installed; empty if unknown."""
    entry = catalog().get(spec.partition("/")[0])
    if entry is None:
        return ()
    if "annotations" in entry.objects:  # categories of COCO
        names = [name if name != "N/A" else "" for name in COCO_CATEGORIES[1:]]
        named = tuple(names) if category_ids else tuple(filter(None, names))
        return named[:1] if persons else named
    return tuple(entry.objects.get("classes", ())) or tuple(entry.masks.get("classes", ())[1:])


def declared_skeleton(spec: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of indices of connected keypoints of a dataset of the catalog; empty if there are none."""
    entry = catalog().get(spec.partition("/")[0])
    return tuple((a - 1, b - 1) for a, b in entry.objects.get("skeleton", ())) if entry else ()
