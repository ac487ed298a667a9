"""--anchor-overlap, SGLang's own switch, and what a platform prefers."""

import pytest

from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.platforms.cuda.platform import CudaPlatform
from anchortp_sglang.platforms.cuda.probe import GpuFacts
from anchortp_sglang.startup import device

OFF = {"disable_overlap_schedule": True}


@pytest.fixture(autouse=True)
def _leave_environment(monkeypatch):
    monkeypatch.setattr(device.os, "environ", dict(device.os.environ))
    monkeypatch.setattr(device, "install_stand_ins", lambda: None)


@pytest.mark.parametrize(
    ("given", "overlap", "off"),
    [
        ({}, "auto", True),
        ({}, "on", None),
        ({}, "off", True),
        (OFF, "auto", None),  # given: nothing is added
        (OFF, "off", None),
        ({"disable_overlap_schedule": False}, "on", None),
    ],
)
def test_the_switch_is_added_where_overlap_is_not_wanted(given, overlap, off):
    assert device.prepare(CpuPlatform(), given, overlap).flags.get("disable_overlap_schedule") is off


@pytest.mark.parametrize(("given", "overlap"), [(OFF, "on"), ({"disable_overlap_schedule": False}, "off")])
def test_a_contradiction_is_refused(given, overlap):
    with pytest.raises(ValueError, match=f"--anchor-overlap {overlap} contradicts --disable-overlap-schedule"):
        device.prepare(CpuPlatform(), given, overlap)


def test_on_gpus_it_is_on_unless_switched_off():
    gpu = GpuFacts(uuid="GPU-0", name="H100", total_bytes=1 << 36, free_bytes=1 << 36, sharing="vmm", peers=["GPU-0"])
    platform = CudaPlatform(gpus=(gpu,))
    assert "disable_overlap_schedule" not in device.prepare(platform, {}, "auto").flags
    assert device.prepare(platform, {}, "off").flags["disable_overlap_schedule"] is True
