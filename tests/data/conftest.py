"""Small image sets for the tests of unloaf.data."""

import pytest

from image_files import write_folders
from unloaf.config import Config
from unloaf.data import load_data


@pytest.fixture
def folders(tmp_path):
    """20 cats and 20 dogs to train on, reds 0 to 39; 3 and 2 to validate with, reds 100 to 104."""
    write_folders(tmp_path / "train", {"cat": 20, "dog": 20})
    write_folders(tmp_path / "val", {"cat": 3, "dog": 2}, first=100)
    return tmp_path


@pytest.fixture
def folder_config(folders):
    def build(**settings):
        return Config(
            **{"dataset": "imagefolder", "data_dir": str(folders), "img_size": 8, "batch_size": 4, "crop_pct": 1.0}
            | settings
        )

    return build


@pytest.fixture(scope="session")
def digits():
    return load_data(Config())
