"""The card of a saved model: what it says, that nothing in it can be injected, whose README stays, and its upload."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import markdown_it
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EVALUATION, edit_config, refusal, tiny

from dc_ssdae import DCSSDAE, InputError
from dc_ssdae.card import (
    MARKER,
    render_model_card,
    write_model_card,
)
from dc_ssdae.provenance import LONGEST_TEXT, Provenance

REPOSITORY = Path(__file__).resolve().parents[1]
PARAMETERS = {"encoder": 1234567, "decoder": 89}
CONFIG: dict[str, Any] = {
    "latent_channels": 4,
    "downsample_factor": 8,
    "encoder": {"class_path": "DCEncoder"},
    "decoder": {"class_path": "UViTDecoder"},
    "dynamics": {"class_path": "FlowMatching"},
}


@pytest.fixture(scope="module")
def model() -> DCSSDAE:
    torch.manual_seed(0)
    return tiny(provenance={"preset": "demo", "steps": 30})


def render(provenance: dict[str, Any] | None = None, repo_id: str | None = None, **config: Any) -> str:
    return render_model_card({**CONFIG, **config, "provenance": provenance}, PARAMETERS, None, repo_id)


def front_matter(card: str) -> Any:
    _, matter, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(matter)


class TestContent:
    def test_a_model_of_which_all_is_known(self) -> None:
        known = {"preset": "demo", "data": "owner/photos", "steps": 30, "license": "mit", "evaluations": [EVALUATION]}
        card = render(known, "owner/name", scaling_factor=0.5, shift_factor=0.25)
        for line in (
            "# DC-SSDAE f8c4",
            "- **Encoder**: `DCEncoder`, 1,234,567 parameters",
            "- **Data**: `owner/photos`",
            "Protocol `dcae`, data `photos/validation`, images 5,000, image size 256, "
            "decoding `sampler` `nesterov`, `num_steps` 4, `step_size` 0.5, 0.25:",
            "| `psnr` | 25.125 (25 to 25.25) |",
            "| `lpips` † | 0.5 |",
            "- **`lpips` †**: `random`",
        ):
            assert line in card.splitlines(), line
        assert "4×32×32, 48 image values per latent value" in card
        assert "`shift_factor` 0.25 and `scaling_factor` 0.5." in card
        assert "is not stated" not in card
        data = ModelCard(card).data
        assert (data.library_name, data.license, data.datasets) == ("diffusers", "mit", ["owner/photos"])
        # What has a note may not be compared, and is not listed beside other models' figures.
        (result,) = data.eval_results
        assert (result.metric_type, result.metric_value, result.dataset_name) == ("psnr", 25.125, "photos/validation")
        assert "protocol dcae" in result.metric_name

    def test_a_model_of_which_nothing_is_known(self) -> None:
        card = render()
        assert "Its training is not recorded." in card
        assert "A licence for these weights is not stated" in card
        assert 'from_pretrained("PATH/TO/THIS/FOLDER")' in card
        assert "## Figures" not in card
        assert "random weights" not in card
        assert front_matter(card).keys() == {"library_name", "tags"}

    def test_random_weights_and_figures_of_the_training_are_told_apart(self) -> None:
        """The hub would list them beside other models' figures."""
        watching = {"protocol": "training", "data": "x", "images": 9, "step": 20, "metrics": {"mse": {"value": 0.125}}}
        for known, *words in (
            ({"untrained": ["encoder", "decoder"], "evaluations": [EVALUATION]}, "> **The encoder has random weights"),
            ({"untrained": ["decoder"]}, "> **The decoder has random weights: not trained.**"),
            ({"evaluations": [watching]}, "Protocol `training`, data `x`, images 9, step 20:", "| `mse` | 0.125 |"),
        ):
            card = render(known)
            assert all(text in card for text in words)
            assert "model-index" not in front_matter(card)

    def test_the_loading_lines_work(self, model: DCSSDAE, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path, variant="ema", max_shard_size="50KB")
        card = (tmp_path / "README.md").read_text()
        assert 'from_pretrained("PATH/TO/THIS/FOLDER", variant="ema")' in card
        assert f", {sum(parameter.numel() for parameter in model.decoder.parameters()):,} parameters\n" in card
        (code,) = re.findall(r"```python\n(import torch.*?)```", card, re.DOTALL)
        found: dict[str, Any] = {}
        code = code.replace("PATH/TO/THIS/FOLDER", str(tmp_path)).replace("256", "32")
        exec(code, found)
        assert found["y"].shape == (1, 3, 32, 32)

    def test_what_it_cites_is_in_the_citation_file(self) -> None:
        cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
        report = cited["preferred-citation"]
        works = {entry["title"]: entry["doi"] for entry in cited["references"]}
        for others in ({}, {"encoder": {"class_path": "KLEncoder"}, "dynamics": {"class_path": "EquilibriumMatching"}}):
            card = render(**others)
            assert f"{{{report['title']}}}" in card
            assert f"{{{{{report['authors'][0]['name']}}}}}" in card
            found = dict(re.findall(r"^- \[(.*)\]\(https://arxiv.org/abs/(.*)\)$", card, re.MULTILINE))
            assert len(found) == 3
            assert {title: f"10.48550/arXiv.{number}" for title, number in found.items()}.items() <= works.items()
            assert f"under {cited['license']}." in card


CRAFTED = (
    "---",
    "--- x: !!python/object/apply:os.system ['id']",
    "<script>alert(1)</script>",
    "![x](https://host/pixel.png)",
    "`` ` `` </code> | a",
    "null",
    MARKER[:LONGEST_TEXT],
)
SIGNS = st.sampled_from("`|\\<>[](){}!#*_-:&'\"~$ @/.%?+=ab1é漢")
HOSTILE = st.text(SIGNS, min_size=1, max_size=40) | st.sampled_from(CRAFTED)


class TestInjection:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(HOSTILE, HOSTILE, HOSTILE)
    def test_hostile_texts_stay_texts(self, first: str, second: str, third: str) -> None:
        metrics = {"psnr": {"value": 1.5}, third: {"value": 2.0, "note": second}}
        figures = {"protocol": third, "data": first, "images": 3, "decoding": {second: third}, "metrics": metrics}
        provenance = {"preset": first, "changes": [second, third], "data": second, "evaluations": [figures]}
        try:
            Provenance.from_mapping(provenance)
        except InputError:
            return
        card = render(provenance, encoder={"class_path": f"mine.{third}"})
        assert card.splitlines().count(MARKER) == 1
        matter = front_matter(card)
        assert matter["library_name"] == "diffusers"
        if third != "training":
            assert matter["model-index"][0]["results"][0]["dataset"]["name"] == first
        tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
        inline = [child for token in tokens for child in token.children or []]
        spans = [child.content for child in inline if child.type == "code_inline"]
        for text in (first, second, third):
            assert any(" ".join(text.split()) == " ".join(span.split()) for span in spans), text
        # No HTML but our marker, no picture, no link but those to the works, and the structure of any card.
        assert [token.content for token in tokens if token.type == "html_block"] == [f"{MARKER}\n"]
        assert not [child for child in inline if child.type in ("html_inline", "image")]
        links = [child.attrs["href"] for child in inline if child.type == "link_open"]
        assert all(str(link).startswith("https://arxiv.org/abs/") for link in links)
        assert sum(token.type == "heading_open" for token in tokens) == 6
        assert sum(token.type == "tr_open" for token in tokens) == 3


class TestSaving:
    def test_a_wrong_provenance_is_refused_wherever_it_comes_from(self, model: DCSSDAE, tmp_path: Path) -> None:
        assert "unknown key of provenance 'x'" in refusal(tiny, provenance={"x": 1})
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, provenance={"data": "a\nb"})
        for work in (DCSSDAE.from_pretrained, write_model_card):
            assert "provenance.data is " in refusal(work, tmp_path)

    def test_ours_is_written_anew_until_the_marker_is_gone(self, model: DCSSDAE, tmp_path: Path) -> None:
        """A user's own stays, also an empty one."""
        path = tmp_path / "README.md"
        for readme in (b"", b"\xff"):
            path.write_bytes(readme)
            model.save_pretrained(tmp_path)
            assert not write_model_card(tmp_path)
            assert path.read_bytes() == readme
        path.unlink()
        model.save_pretrained(tmp_path)
        first = path.read_text()
        path.write_text(f"{first}more\n")
        model.save_pretrained(tmp_path)
        assert path.read_text() == first
        assert write_model_card(tmp_path)
        path.write_text(first.replace(f"{MARKER}\n", "") + "more\n")
        model.save_pretrained(tmp_path)
        assert path.read_text().endswith("more\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A hub with one repository, whose card lies in `folder`; `files` are the ones that the last upload brought."""
    hub = Mock(folder=tmp_path / "hub")
    hub.folder.mkdir()

    def create(repo_id: str, **_: Any) -> huggingface_hub.RepoUrl:
        huggingface_hub.utils.validate_repo_id(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'owner/{repo_id}'}")

    def upload(folder_path: Path, ignore_patterns: list[str] | None, **_: Any) -> str:
        files = [file for file in folder_path.iterdir() if file.name not in (ignore_patterns or [])]
        hub.files = {file.name: file.read_text("latin-1") for file in files}
        return "the commit"

    hub.create_repo.side_effect, hub.upload_folder.side_effect = create, upload
    hub.file_exists.side_effect = lambda _, name, **__: (hub.folder / name).exists()
    hub.hf_hub_download.side_effect = lambda _, name, **__: hub.folder / name
    for name in ("create_repo", "file_exists", "hf_hub_download", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


class TestUpload:
    def test_it_tells_how_to_load_it_from_there(self, model: DCSSDAE, hub: Mock) -> None:
        given = {"private": True, "token": "t", "create_pr": True, "commit_message": "first"}
        assert model.push_to_hub("name", **given, variant="fp16") == "the commit"
        hub.create_repo.assert_called_once_with("name", private=True, token="t", exist_ok=True)
        expected = {"repo_id": "owner/name", "path_in_repo": None, "commit_message": "first"}
        uploaded = hub.upload_folder.call_args.kwargs
        assert uploaded | expected | {"token": "t", "create_pr": True} == uploaded
        assert hub.files.keys() == {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"}
        assert 'from_pretrained("owner/name", variant="fp16")' in hub.files["README.md"]

    @pytest.mark.parametrize(("card", "stays"), [("mine", True), (f"old\n{MARKER}\n", False)])
    def test_a_card_there_that_is_not_ours_stays(self, model: DCSSDAE, hub: Mock, card: str, stays: bool) -> None:
        (hub.folder / "README.md").write_text(card)
        model.push_to_hub("owner/name")
        assert ("README.md" not in hub.files) == stays
        model.push_to_hub("owner/name", subfolder="vae")
        assert hub.upload_folder.call_args.kwargs["path_in_repo"] == "vae"
        assert "README.md" not in hub.files, "a part of something gets no card"

    def test_saving_can_upload(self, model: DCSSDAE, hub: Mock, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True)
        assert 'from_pretrained("owner/mine")' in hub.files["README.md"]
        (tmp_path / "mine" / "README.md").write_text("my own")
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="other/name")
        assert hub.upload_folder.call_args.kwargs["repo_id"] == "other/name"
        assert hub.files["README.md"] == "my own"
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, is_main_process=False)
        assert hub.upload_folder.call_count == 2

    def test_what_cannot_be_uploaded(self, model: DCSSDAE, hub: Mock) -> None:
        assert "safetensors only" in refusal(model.push_to_hub, "owner/name", safe_serialization=False)
        with pytest.raises(HFValidationError, match="'a/b/c'"):
            model.push_to_hub("a/b/c")

        hub.file_exists.side_effect = ConnectionError  # a card there could be somebody's own
        with pytest.raises(ConnectionError):
            model.push_to_hub("owner/name")
        hub.upload_folder.assert_not_called()
