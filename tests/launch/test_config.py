"""What a job may use: checked when it is said, and kept in a file for each cluster."""

import re

import pytest

from imsvd_core.launch import LaunchConfig, load_profile


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("2-00", 2880),
        ("1-02:03", 1563),
        ("1-02:03:04", 1564),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time, minutes):
    assert LaunchConfig(time=time).minutes == minutes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"time": "a day"}, "time='a day' is no time limit: write minutes"),
        ({"time": "2"}, "time='2' must exceed grace_seconds=120"),
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"executor": "pbs"}, "executor='pbs' must be one of 'slurm', 'local', 'debug'"),
        ({"executor": "local", "nodes": 2}, "nodes=2 needs executor='slurm'"),
        ({"gpus_per_node": 2, "tasks_per_node": 4}, "tasks_per_node=4 exceeds gpus_per_node=2"),
        ({"mem_gb": -1.0}, "mem_gb=-1.0 must be positive"),
    ],
)
def test_what_cannot_be_is_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        LaunchConfig(**settings)


def test_there_is_a_rank_for_each_gpu_unless_told_otherwise():
    assert LaunchConfig(nodes=4, gpus_per_node=8).ranks == 32
    assert LaunchConfig(nodes=2).ranks == 2
    assert LaunchConfig(nodes=2, gpus_per_node=8, tasks_per_node=4).ranks == 8


PROFILES = """
default = "ours"
[ours]
partition = "gpu"
gpus_per_node = 8
setup = ["module load cuda"]
[theirs]
partiton = "gpu"
"""


def test_a_profile_spares_typing(tmp_path, monkeypatch):
    file = tmp_path / "clusters.toml"
    file.write_text(PROFILES)
    monkeypatch.setenv("IMSVD_CLUSTERS", str(file))
    assert (
        load_profile()
        == load_profile("ours")
        == LaunchConfig(partition="gpu", gpus_per_node=8, setup=("module load cuda",))
    )
    with pytest.raises(
        ValueError, match=r"\[theirs\]: LaunchConfig has no field partiton; it has: executor, nodes"
    ):
        load_profile("theirs")
    with pytest.raises(
        ValueError, match=r"profile='nowhere' is not in .*; there are: ours, theirs"
    ):
        load_profile("nowhere")
    file.write_text("[ours")
    with pytest.raises(ValueError, match="is not TOML"):
        load_profile()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('setup = "module load cuda"', "setup='module load cuda' must be a list"),
        ("time = 60", "time=60 must be text, in quotes"),
        ('mem_gb = "x"', "mem_gb='x' must be a number"),
        ("nodes = true", "nodes=True must be a whole number"),
        ("nodes = 1.5", "nodes=1.5 must be a whole number"),
        ("executor = 3", "executor=3 must be one of slurm, local, debug"),
    ],
)
def test_a_profile_s_values_must_be_of_their_kind(tmp_path, line, words):
    (tmp_path / "clusters.toml").write_text(f"[ours]\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_profile("ours", tmp_path / "clusters.toml")
    (tmp_path / "clusters.toml").write_text("[ours]\nmem_gb = 200\n")
    assert load_profile("ours", tmp_path / "clusters.toml").mem_gb == 200


def test_without_a_file_the_defaults_hold_and_a_name_is_refused(tmp_path):
    assert load_profile(path=tmp_path / "none.toml") == LaunchConfig()
    with pytest.raises(ValueError, match=r"profile='ours' is not in .*; there are: none"):
        load_profile("ours", tmp_path / "none.toml")
