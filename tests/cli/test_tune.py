"""``kvquant tune``: the file that it writes is a policy, and measures as it says."""

import json
from pathlib import Path

import pytest
from command import Run, is_one_sentence

from kvquant_hf import LayerwisePolicy
from kvquant_hf.policies.file import write_layers
from kvquant_hf.policies.table import parse_policy


def test_command(run: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    options = ("--context", "40", "--page-size", "16", "--windows", "2", "--budget", "6")
    code, printed, err = run("tune", "--model", tiny, "--out", out, *options, "--json")
    assert code == 0, err
    data, file = json.loads(printed), json.loads(out.read_text())
    policy = parse_policy(out)
    assert policy.as_dict()["layers"] == file["layers"] == data["layers"] and len(file["layers"]) == 2
    assert data["bits_per_element"] <= 6 and data["measured"]["on"]["windows"] == 2
    assert set(data["measured"]["kld"]) == {"tuned", "kv2.9", "kv3", "int4"}
    assert data["measured"]["rung_of_one_part"] == {"keys": "int3-ranked", "values": "octet3"}
    code, printed, _ = run("eval", "--model", tiny, "--policies", f"{out},int8", *options[:6], "--json")
    row = json.loads(printed)["caches"][str(out)]
    assert code == 0 and row["page_bits_per_element"] == pytest.approx(data["bits_per_element"], rel=1e-12)
    code, printed, err = run("tune", "--model", tiny, "--out", out, *options)
    assert code == 0 and "octet3" in printed and "kv2.9" in printed and str(out) in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--out", "x.txt"), ".json"),
        (("--out", "/no/such/folder/x.json"), "folder that exists"),
        (("--out", "x.json", "--context", "64"), "--context"),
        (("--out", "x.json", "--text", "/no/such/file"), "No such file"),
        (("--out", "x.json", "--page-size", "60"), "multiple of 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_sentence(run: Run, tiny: Path, args: tuple[str, ...], word: str) -> None:
    code, out, err = run("tune", "--model", tiny, "--json", *args)
    assert code == 2 and out == "" and is_one_sentence(err) and word in err


def test_a_file_of_another_model(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    write_layers(path, LayerwisePolicy(["int8", "int8"]).as_dict()["layers"], ("gpt2", 2), {})
    code, _, err = run("eval", "--model", tiny, "--policies", path, "--context", "40", "--windows", "1", "--json")
    assert code == 2 and is_one_sentence(err) and "gpt2" in err and "kvquant tune" in err
