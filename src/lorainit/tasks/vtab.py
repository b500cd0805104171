"""The 19 tasks of VTAB-1k (Zhai et al. 2019, arXiv:1910.04867): seven natural, four specialized, eight structured.

The hub's copies are the CLIP benchmark's, which made the labels with VTAB's code, but left dSprites' as they are there:
32 positions and 40 angles, which VTAB groups into 16 classes each and `raw_labels` does here. CIFAR-100 and SUN397 come
from elsewhere; the CLIP benchmark's SUN397 has a test part alone. The other copy's three parts and two columns were
looked up, as were dSprites' numbers of labels; none of the copies has been loaded here.

The 800 and 200 images are drawn here (see `ImageTask`): they are not the published draw, which its authors give as file
lists.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from .images import ImageTask

GROUPS = ("natural", "specialized", "structured")


def _task(
    name: str, group: str, num_labels: int, source: str, owner: str = "clip-benchmark", raw_labels: int | None = None
) -> ImageTask:
    return ImageTask(
        name=name,
        hub=(f"{owner}/{source}", None),
        columns=("image", "label"),
        num_labels=num_labels,
        group=group,
        raw_labels=raw_labels,
    )


# in the order of the papers' tables
TASKS = (
    _task("cifar100", "natural", 100, "cifar100", "uoft-cs"),
    _task("caltech101", "natural", 102, "wds_vtab-caltech101"),
    _task("dtd", "natural", 47, "wds_vtab-dtd"),
    _task("flowers102", "natural", 102, "wds_vtab-flowers"),
    _task("pets", "natural", 37, "wds_vtab-pets"),
    _task("svhn", "natural", 10, "wds_vtab-svhn"),
    _task("sun397", "natural", 397, "sun397", "dpdl-benchmark"),
    _task("camelyon", "specialized", 2, "wds_vtab-pcam"),
    _task("eurosat", "specialized", 10, "wds_vtab-eurosat"),
    _task("resisc45", "specialized", 45, "wds_vtab-resisc45"),
    _task("retinopathy", "specialized", 5, "wds_vtab-diabetic_retinopathy"),
    _task("clevr-count", "structured", 8, "wds_vtab-clevr_count_all"),
    _task("clevr-distance", "structured", 6, "wds_vtab-clevr_closest_object_distance"),
    _task("dmlab", "structured", 6, "wds_vtab-dmlab"),
    _task("kitti", "structured", 4, "wds_vtab-kitti_closest_vehicle_distance"),
    _task("dsprites-location", "structured", 16, "wds_vtab-dsprites_label_x_position", raw_labels=32),
    _task("dsprites-orientation", "structured", 16, "wds_vtab-dsprites_label_orientation", raw_labels=40),
    _task("smallnorb-azimuth", "structured", 18, "wds_vtab-smallnorb_label_azimuth"),
    _task("smallnorb-elevation", "structured", 9, "wds_vtab-smallnorb_label_elevation"),
)


# no task of VTAB's, but small and free
EXTRA = (_task("fashion-mnist", "", 10, "fashion_mnist", "zalando-datasets"),)


def means(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean score of each group and of all tasks, and the mean of the three groups, VTAB's usual figure.

    Args:
        scores: {task: score}; a group of which a task is missing gets no mean.

    Example:
        >>> means({"camelyon": 80.0, "eurosat": 90.0, "resisc45": 70.0, "retinopathy": 60.0})
        {'specialized': 75.0}
    """
    groups = {group: [task.name for task in TASKS if task.group == group] for group in GROUPS}
    complete = {group: names for group, names in groups.items() if all(name in scores for name in names)}
    found = {group: statistics.mean(scores[name] for name in names) for group, names in complete.items()}
    if len(found) == len(GROUPS):
        found |= {
            "all": statistics.mean(scores[task.name] for task in TASKS),
            "groups": statistics.mean(found.values()),
        }
    return found
