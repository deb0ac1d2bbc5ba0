"""The package's own door: three names, imported when they are used."""

import subprocess
import sys

import pytest

import imsvd_core
from imsvd_core.loss import CrossJointEntropyLoss
from imsvd_core.recipes import recipe
from imsvd_core.runs.pretrain import pretrain


def test_the_loss_a_recipe_and_a_training_are_imported_from_the_package_itself():
    assert imsvd_core.CrossJointEntropyLoss is CrossJointEntropyLoss
    assert imsvd_core.recipe is recipe
    assert imsvd_core.pretrain is pretrain
    with pytest.raises(AttributeError, match="no attribute 'pretraining'"):
        imsvd_core.pretraining  # noqa: B018


def test_importing_the_package_does_not_wait_for_torch():
    code = "import sys, imsvd_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
