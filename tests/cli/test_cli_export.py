"""`dc-ssdae export`: programs of a saved model, and what is refused before it is loaded."""

from pathlib import Path

from cli_samples import Run


def test_programs_of_a_saved_model(run: Run, model_dir: Path) -> None:
    """What they compute is tested in tests/interop/test_export.py."""
    out = Path("made/programs")
    outcome = run("export", "--model", model_dir, "--out", out, "--size", 16, 24)
    assert (outcome.code, outcome.err) == (0, [])
    encoder, decoder, files = outcome.out
    assert encoder.startswith("encoder.pt2: {'x': ['batch', 3, 16, 24]} -> {'mean': ['batch', 4, 2, 3], 'logvar': ")
    assert decoder.startswith("decoder.pt2: {'z': ['batch', 4, 2, 3], 'noise': ['batch', 3, 16, 24]} -> {'image': ")
    assert files.startswith("decoder.pt2, encoder.pt2, export.json, noise.safetensors -> ")
    assert sorted(path.name for path in out.iterdir()) == files.partition(" -> ")[0].split(", ")
