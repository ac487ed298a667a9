"""The Gantt picture: every transfer is in it, inside of its borders, as SVG and as PNG."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from PIL import Image

from anchortp_sglang.planning.placement.migration_types import Transfer
from anchortp_sglang.planning.prediction.presets import machine
from anchortp_sglang.planning.prediction.schedule import schedule
from anchortp_sglang.planning.prediction.simulation import predict_recovery, predict_restart
from anchortp_sglang.views.picture import BACKGROUND, Box, Label, Picture, PictureError, save, to_svg
from anchortp_sglang.views.plan_plot import MOST_FLOWS, gantt

TOPOLOGY = machine("8xH100-NVLink")
SVG = "{http://www.w3.org/2000/svg}"


def moves(devices, layers=4):
    return [
        Transfer(kind, device, source, "mlp", layer, layer + 1, ((0, 1),), 10**8)
        for layer in range(layers)
        for device in range(devices - 1)
        for kind, source in (("reload", None), ("p2p", device + 1))
    ]


def drawn(transfers, topology=TOPOLOGY):
    timeline = schedule(topology, transfers)
    return gantt(
        "Loss <of> device 3 & its bytes",
        timeline,
        predict_recovery(topology, timeline, 4, {}),
        predict_restart(topology, {0: 10**9}, 10**9),
    )


@pytest.mark.parametrize("transfers", [moves(8), moves(2, 1), []])
def test_all_lies_inside_of_the_picture(transfers):
    picture = drawn(transfers)
    for box in picture.boxes:
        assert 0 <= box.x <= box.x + box.width <= picture.width
        assert 0 <= box.y <= box.y + box.height <= picture.height
    assert all(0 <= label.x <= picture.width and 0 < label.y < picture.height for label in picture.labels)


def test_each_transfer_and_stage_has_a_box_and_each_flow_a_name():
    picture = drawn(moves(8))
    tips = [box.tip for box in picture.boxes if box.tip]
    assert len([tip for tip in tips if " bytes," in tip]) == 4 * 7 * 2
    names = {label.text for label in picture.labels}
    assert {"device 0: reload", "device 6: p2p from 7", "first token", "graphs", "processes started"} <= names


def test_a_crowd_of_devices_is_cut_and_said_so():
    picture = drawn(moves(100), machine("8xH100-NVLink", 100))
    assert any(f"{2 * 99 - MOST_FLOWS} of {2 * 99} flows are not shown" in label.text for label in picture.labels)


def test_the_svg_is_well_formed_and_needs_nothing_else(tmp_path):
    path = tmp_path / "out.svg"
    save(drawn(moves(8)), path)
    root = ET.fromstring(path.read_text())
    assert root.find(f"{SVG}title").text == "Loss <of> device 3 & its bytes"
    assert len(root.findall(f"{SVG}rect")) > 56
    assert "href" not in path.read_text()


def test_the_png_shows_the_boxes_where_they_are(tmp_path):
    path = tmp_path / "out.PNG"
    save(Picture(40, 20, "t", (Box(10, 5, 20, 10, "#ff0000"),), (Label(1, 1, "", "end", bold=True),)), path)
    with Image.open(path) as image:
        assert image.size == (80, 40)
        assert image.getpixel((40, 20)) == (255, 0, 0)
        assert image.getpixel((4, 4)) == tuple(bytes.fromhex(BACKGROUND[1:]))


def test_other_kinds_of_picture_are_refused(tmp_path):
    with pytest.raises(PictureError, match=r"\.png or \.svg, not \.gif"):
        save(drawn([]), tmp_path / "out.gif")


def test_a_tip_cannot_break_out_of_the_svg():
    picture = drawn([])
    told = replace(picture, boxes=(Box(0, 0, 1, 1, "#000000", "</title><script>"),))
    assert "<script>" not in to_svg(told)
