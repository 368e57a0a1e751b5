"""Report which parts of serving the plugin takes over and which the environment's settings leave to the engine."""

from __future__ import annotations

from k26_plugins.common import settings
from k26_plugins.operate.doctor.finding import Finding, Level


def piece_findings() -> list[Finding]:
    """Return the setting of each part (experts, prompts, media, parsers), or a fault if a value is invalid."""
    try:
        settings.check_settings()
    except ValueError as error:
        return [Finding(Level.BAD, "settings", str(error), "a server would not start")]
    parsers = {"auto": "ours", "none": "none by default"}.get(settings.PARSERS.read(), "the engine's")
    pieces = {
        "experts": (settings.EXPERTS.read(), settings.EXPERTS.variable),
        "prompts": (
            "ours" if settings.PROMPTS.read() != settings.ENGINE else "the engine's",
            settings.PROMPTS.variable,
        ),
        "images and videos": (
            "ours" if settings.MEDIA.read() != settings.ENGINE else "the engine's",
            settings.MEDIA.variable,
        ),
        "parsers": (parsers, settings.PARSERS.variable),
    }
    detail = ", ".join(f"{piece} {whose} ({variable})" for piece, (whose, variable) in pieces.items())
    return [Finding(Level.NOTE, "pieces", detail)]
