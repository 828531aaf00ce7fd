"""The shipped recipes: each is read and trains, and those of the five papers say what the papers do."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from fastpose.checkpoints import read_info
from fastpose.cli import main
from fastpose.codecs import AssociativeEmbeddingCodec, MSRAHeatmapCodec
from fastpose.config import read_config
from fastpose.data.crops import Augmentation
from fastpose.train import Schedule, Stage, TrainConfig, train
from tests import datasets

FOLDER = Path(str(resources.files("fastpose.recipes")))
NAMES = sorted(p.stem for p in FOLDER.glob("*.toml"))
# recipe -> size, epochs, batch, rate, epochs of the steps, rotation, scale, shift, half body, how these are drawn,
# weight decay, initialization
PAPERS = {
    "hr_litenet_mpii": ((256, 256), 210, 32, 1e-3, (170, 200), 30, (0.75, 1.25), 0, 0, "hrnet", 1e-4, "hrnet"),
    "le_hrnet_coco": ((256, 192), 230, 32, 1e-3, (170, 210), 45, (1, 1), 0, 0, "hrnet", 0, "hrnet"),
    "lightweight_hrnet_coco": ((448, 448), 300, 24, 1e-3, (200, 260), 30, (0.75, 1.5), 0.2, 0, "uniform", 0, "hrnet"),
    "lite_csw_hrnet_coco": ((256, 192), 210, 256, 2e-3, (170, 200), 30, (0.75, 1.25), 0, 0.3, "uniform", 0, "hrnet"),
    "mobileposenet_coco": ((256, 192), 210, 32, 1e-3, (170, 200), 45, (0.65, 1.35), 0, 0.3, "uniform", 0, "torch"),
}


def read(name: str, *settings: str) -> TrainConfig:
    return read_config(TrainConfig, FOLDER / f"{name}.toml", ["data=d", "output=o", *settings])


def test_every_recipe_is_known_here():
    assert set(PAPERS) < set(NAMES) and all(read(name).model for name in NAMES)


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_of_the_papers(name):
    config = read(name)
    size, epochs, batch, rate, milestones, rotation, scale, shift, half_body, law, decay, initialization = PAPERS[name]
    assert config.stages == (Stage(size, epochs, batch),) and config.optimizer == "adam" and config.lr == rate
    expected = Augmentation(rotation=rotation, scale=scale, shift=shift, mirror=0.5, half_body=half_body, law=law)
    assert config.augment == expected
    assert (config.weight_decay, config.initialization) == (decay, initialization)
    assert (config.gamma, config.clip, config.ema) == (0.1, 0.0, 0.0)
    bottom_up = name == "lightweight_hrnet_coco"
    assert bottom_up or config.padding == 1.25
    assert config.codec == (AssociativeEmbeddingCodec() if bottom_up else MSRAHeatmapCodec())
    schedule = Schedule(config, 10 * batch)
    after = [schedule.factor(10 * epoch) for epoch in (milestones[0] - 1, milestones[0], milestones[1])]
    assert np.allclose(after, [1.0, 0.1, 0.01]) and schedule.total == 10 * epochs
    assert schedule.factor(0) == (1 / 501 if name == "lite_csw_hrnet_coco" else 1.0)


@pytest.mark.parametrize("name", PAPERS)
def test_recipes_train(name, tmp_path):
    data = tmp_path / "data"
    if name.endswith("mpii"):
        pytest.importorskip("scipy")
        datasets.write_mpii(data)
    else:
        datasets.write_standard_coco(data)
    settings = [f"data={data}", f"output={tmp_path / 'run'}", 'splits=["val","val"]', "limit=3", "workers=0"]
    settings += ["stages=[{size=[64,64],epochs=1,batch_size=2}]"]
    config = read_config(TrainConfig, FOLDER / f"{name}.toml", settings)
    train(config, quiet=True)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert 1 <= int(rows[-1]["step"]) <= 3 and float(rows[-1]["loss"]) > 0
    assert read_info(tmp_path / "run" / "best.safetensors").model == config.model


def test_recipes_are_found_by_their_names(tmp_path, capsys):
    assert main(["train", "--config", "hr_litenet_mpii", f"data={tmp_path}", f"output={tmp_path / 'run'}"]) == 2
    assert "MPII annotations do not exist" in capsys.readouterr().err
    assert main(["train", "--config", "hr_litenet_mpi", f"data={tmp_path}", f"output={tmp_path / 'run'}"]) == 2
    assert "configuration file hr_litenet_mpi does not exist" in capsys.readouterr().err
