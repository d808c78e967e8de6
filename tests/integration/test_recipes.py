"""`dc-ssdae train --recipe` as a user meets it: all phases by one command."""

from PIL import Image
from tiny import make_images
from training_runs import train, write_config

from dc_ssdae.cli.main import main


def test_the_folder_of_a_recipe_serves_as_a_model(tmp_path):
    """The packaged recipe, small, in the folder that it gets by itself."""
    make_images(tmp_path / "train", 12)
    make_images(tmp_path / "validation", 3, seed=1)
    config = write_config(tmp_path / "tiny.yaml", tmp_path, optimizer="adamw", sample_images=0)
    words = ["--recipe", "three_phase", "--config", str(config), "--training.steps", "2"]
    words += ["--data.image_size", "32", "--training.batch_size", "4"]
    assert train(words, tmp_path / "log", cwd=tmp_path) == 0, (tmp_path / "log").read_text()
    run = tmp_path / "runs" / "tiny-three_phase"
    assert "done after step 2: the model is runs/tiny-three_phase/model" in (tmp_path / "log").read_text()

    photo, out, results = tmp_path / "photo.png", tmp_path / "out", []
    Image.new("RGB", (20, 30), "teal").save(photo)
    for model in (run, run / "3-decoder_refinement", run / "1-low_resolution"):
        assert main(["reconstruct", str(photo), "--model", str(model), "--out", str(out), "--overwrite"]) == 0
        results.append((out / "photo.png").read_bytes())
    assert results[0] == results[1] != results[2]
