"""What a run learns from and is validated on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastpose.codecs import AssociativeEmbeddingCodec, HeatmapCodec
from fastpose.data import PoseData, load_dataset
from fastpose.data.crops import CropDataset, CropStore
from fastpose.data.scenes import Mosaics, SceneDataset, SceneStore, load_mosaics, write_mosaics
from fastpose.distributed import rank, wait_for_all
from fastpose.images import ImageError
from fastpose.metrics import torso_lengths
from fastpose.scoring import check_metric
from fastpose.skeletons import describe_difference
from fastpose.training.settings import Stage, TrainConfig

Store = CropStore | SceneStore


def load_split(config: TrainConfig, split: str) -> PoseData:
    """A part of the config's data set; raises ValueError if nobody is in it."""
    skeleton, metric = config.skeleton or None, config.metric or None
    data = load_dataset(config.dataset, config.data, split, skeleton=skeleton, limit=config.limit, metric=metric)
    if len(data) == 0:
        raise ValueError(
            f"nobody to estimate in the split {split!r}: "
            f"{data.report.to_text() or f'its {len(data.image_files())} images have no annotations'}"
        )
    return data


def check_splits(config: TrainConfig, train: PoseData, val: PoseData) -> None:
    """Tell if images are in both; raise ValueError for other keypoints, which the first validation would find."""
    first, second = config.splits
    if train.skeleton.names != val.skeleton.names:
        difference = describe_difference(train.skeleton, val.skeleton)
        raise ValueError(
            f"the splits have other keypoints: {first!r} has {train.skeleton.name!r}, {second!r} has {difference}"
        )
    both = set(train.image_files()) & set(val.image_files())
    if both and first != second and rank() == 0:
        print(
            f"fastpose: {len(both)} images are in {first!r} and in {second!r}: the validation says little about others",
            file=sys.stderr,
        )


def check_validation(data: PoseData) -> None:
    """Raise ValueError if the first validation could measure nothing: hours are lost by then."""
    check_metric(data)
    if data.metric == "PCK@0.2" and not (torso_lengths(data.keypoints, data.labelled, data.skeleton) > 0).any():
        raise ValueError(
            f"PCK@0.2 is in units of the torso, from a shoulder to the other side's hip: none of the {len(data)} "
            "people to validate on has both labelled"
        )
    problem = "there are none"
    for i in range(len(data)):
        try:
            data.read(i)
            return
        except ImageError as error:
            problem = str(error)
    raise ValueError(f"none of the {len(data)} people to validate on has an image that can be read: {problem}")


def open_store(config: TrainConfig, data: PoseData, quiet: bool = True) -> Store:
    """The decoded people of `data`, or for a bottom-up network without mosaics its decoded images."""
    memory = config.memory * 2**30
    if config.bottom_up and not config.mosaic:
        return SceneStore(data, max(min(s.size) for s in config.stages), memory, quiet)
    side = max(max(s.size) for s in config.stages)
    if config.mosaic:  # whose cells are smaller than the input
        return CropStore(data, config.padding, side, memory, quiet)
    reach = max(config.augment.reach(s.size) for s in config.stages)
    return CropStore(data, config.padding, round(side * config.augment.zoom), memory, quiet, reach)


def make_dataset(config: TrainConfig, store: Store, stage: Stage, seed: int) -> Dataset[Any]:
    """Samples of an image and the arguments of the codec's loss."""
    codec = config.codec
    if isinstance(codec, AssociativeEmbeddingCodec):
        scenes = store if isinstance(store, SceneStore) else Mosaics(store, stage.size, stage.mosaic or config.mosaic)
        return SceneDataset(scenes, stage.size, config.augment, seed)
    assert isinstance(codec, HeatmapCodec) and isinstance(store, CropStore)
    return CropDataset(store, stage.size, config.augment, seed, codec.convention, codec.draws_outside)


def scenes_to_validate(config: TrainConfig, data: PoseData, output: Path, resume: bool = False) -> PoseData:
    """What a bottom-up network is validated on: `data`, or mosaics of it, which are written to `output`.

    There are as many mosaics as people are in `data` for each of the mosaic's cells; they do not depend on the seed.
    Those that are there already are taken if `resume` is true: otherwise they are left from another run.

    Raises:
        ValueError: `data` does not have everybody on its images, and no mosaics are wanted.
    """
    if not config.mosaic:
        if data.annotated is None:
            raise ValueError(
                f"{config.model} finds people itself, and dataset {config.dataset!r} does not say whether everybody is "
                "annotated; train on mosaics of its people, e.g. mosaic=4"
            )
        return data
    folder, size = output / "mosaics", config.stages[-1].size
    if rank() == 0 and not resume:
        (folder / "annotations.json").unlink(missing_ok=True)
    if rank() == 0 and not (folder / "annotations.json").is_file():
        mosaics = Mosaics(CropStore(data, config.padding, max(size), 0), size, config.mosaic)
        write_mosaics(mosaics, folder, max(1, len(data) // config.mosaic))
    wait_for_all()
    return replace(load_mosaics(folder, data.skeleton), metric=config.measure)
