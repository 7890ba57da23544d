"""What a configuration may say but probably does not mean. Shown by `check` and at the start."""

from msgspec import Struct

from extproc.config.schema import Config

__all__ = ["ConfigWarning", "config_warnings"]


class ConfigWarning(Struct, frozen=True):
    """A key, what follows from its value, and what to change."""

    key: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}; {self.fix}"


def config_warnings(config: Config) -> list[ConfigWarning]:
    """The warnings of a configuration that keeps all rules."""
    found = []
    if config.envoy.has_ads and config.fails_open and not config.knows_all_workers:
        found.append(
            ConfigWarning(
                "envoy.fail_open_host",
                "not set, so an Envoy that starts while this service is down knows no worker, and "
                "answers 503",
                "name the headless Service of the workers, as host:port",
            )
        )
    return found
