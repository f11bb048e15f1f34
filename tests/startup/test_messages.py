import logging

import pytest

from mobilellm_jax.startup.messages import show_messages


def test_a_message_appears_once_without_prefix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may add a handler to the root logger, as `logging.basicConfig` does."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    show_messages()
    show_messages()
    logging.getLogger("mobilellm_jax.anything").info("by the way")
    logging.getLogger("mobilellm_jax.anything").debug("a detail")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "by the way\n")
