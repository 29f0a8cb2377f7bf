"""Failed saves: earlier files stay, and no half-written file is left."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from modeling_unihyperlora import AdapterFileError, storage
from modeling_unihyperlora.storage import WEIGHTS_NAME, replacing
from tests.modeling_unihyperlora.test_storage import files_in


class TestFailedSave:
    """The earlier file stays, no temporary one is left, and the error is ours."""

    @staticmethod
    def assert_refused(model, folder, match: str) -> None:
        before = files_in(folder)
        with torch.no_grad():
            model.adapter.atoms_out.latent.mul_(2)
        with pytest.raises(AdapterFileError, match=match):
            model.save_pretrained(folder)
        assert files_in(folder) == before

    def test_below_a_regular_file(self, saved, tmp_path):
        (tmp_path / "file").write_text("here")
        with pytest.raises(AdapterFileError, match="cannot be written"):
            saved[0].save_pretrained(tmp_path / "file" / "adapter")
        assert (tmp_path / "file").read_text() == "here"

    def test_the_target_is_a_folder(self, saved):
        model, folder = saved
        (folder / WEIGHTS_NAME).unlink()
        (folder / WEIGHTS_NAME).mkdir()
        self.assert_refused(model, folder, "cannot be written")

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: no space")])
    def test_disk_full_while_writing(self, error, saved, monkeypatch):
        def half_written(tensors, path, metadata):
            with open(path, "wb") as file:
                file.write(b"half of it")
            raise error

        monkeypatch.setattr(storage, "save_file", half_written)
        self.assert_refused(*saved, "cannot be written .*pace")

    @pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
    def test_failure_at_the_end(self, call, saved, monkeypatch):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left")

        monkeypatch.setattr(storage.os, call, full)
        self.assert_refused(*saved, "cannot be written .*No space left")

    def test_interrupted(self, saved, monkeypatch):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        model, folder = saved
        before = files_in(folder)
        monkeypatch.setattr(storage, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
        assert files_in(folder) == before

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["atoms_in.latent", "tasks.ner.delta.latent", "tasks.ner.mean_gate"])
    def test_not_finite(self, name, value, saved, tmp_path):
        model, folder = saved
        state = dict(model.adapter.state_dict())
        state[name].view(-1)[0] = value
        self.assert_refused(model, folder, f"'{name}' holds NaN or infinite values")
        with pytest.raises(AdapterFileError):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_beyond_half_precision(self, saved):
        """A value that is finite in training but infinite in the file is not written: loading would refuse it."""
        with torch.no_grad():
            saved[0].adapter.router_bias.latent[3] = 1e6
        self.assert_refused(*saved, "'router_bias' holds values too large for torch.float16")

    def test_weights_and_config_are_replaced_together(self, saved, monkeypatch):
        """If writing the second file fails, the first file stays unchanged, so that they always belong together."""
        model, folder = saved
        model.add_task("other", ["x", "y"])
        monkeypatch.setattr(storage, "_json", lambda content: (_ for _ in ()).throw(OSError("full")))
        self.assert_refused(model, folder, "cannot be written")


class TestReplacing:
    def test_other_errors_pass_and_leave_nothing(self, tmp_path):
        (tmp_path / "x").write_text("old")
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as temporary:
            open(temporary, "w").write("new")
            raise ZeroDivisionError
        assert files_in(tmp_path) == {"x": b"old"}

    def test_takes_the_place(self, tmp_path):
        with replacing(tmp_path / "deep" / "x") as temporary:
            open(temporary, "w").write("new")
            assert not (tmp_path / "deep" / "x").exists()
        assert files_in(tmp_path) == {"deep/x": b"new"}
