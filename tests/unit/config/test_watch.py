"""Changes of files are seen by their content, however it changes."""

import os
from pathlib import Path

from extproc.config.watch import named_files, see
from tests.unit.configs import config


def test_content_counts_and_not_the_time_of_writing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("one")
    before = see((file,))
    file.write_text("one")
    assert see((file,)) == before
    file.write_text("two")
    os.utime(file, (0, 0))
    assert see((file,)) != before


def test_a_file_that_is_replaced_or_behind_a_link_that_moves_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_text(name)
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "c.yaml").symlink_to("data/c.yaml")
    seen = [see((tmp_path / "c.yaml",))]
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "data")
    seen.append(see((tmp_path / "c.yaml",)))
    (tmp_path / "data").unlink()
    seen.append(see((tmp_path / "c.yaml",)))
    assert len(set(seen)) == 3


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert [word for _, word in see((pipe, tmp_path, tmp_path / "none")).digests] == ["gone"] * 3


def test_certificates_and_keys_are_watched_with_the_file() -> None:
    tls = {"cert_file": "c", "key_file": "k", "client_ca_file": "a"}
    extproc = {"ca_file": "ca", "cert_file": "c", "key_file": "k"}
    watched = named_files(
        Path("f.yaml"),
        config(
            server={"tls": tls},
            workers={"api_key_file": "token", "ca_file": "w"},
            envoy={"extproc": extproc},
        ),
    )
    assert [str(path) for path in watched] == ["f.yaml", "token", "w", "c", "k", "a"]
    assert named_files(Path("f.yaml"), config()) == (Path("f.yaml"),)
