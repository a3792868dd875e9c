"""Finds plugins and decides which one a job means.

Discovery reads the entry-point group ``autodeco.plugins``. Each plugin is loaded in its own ``try``
when it is first asked for: a broken one is a row in ``plugin list``, and an error only for whoever
asks for it. pluggy's own loader would let one broken distribution stop all of them, and let another
silently take a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import pluggy

from autodeco import hookspecs
from autodeco.errors import AutodecoError, PluginError
from autodeco.family import API, AUTO_PRESET, OLDEST_API, FamilySpec, ModelPreset
from autodeco.plugin import FamilyPlugin
from autodeco.resolution import architecture_of, choose_preset, fits, read_config

GROUP = "autodeco.plugins"


class EntryPoint(Protocol):
    """What the registry needs of `importlib.metadata.EntryPoint`."""

    name: str
    value: str
    dist: Any

    def load(self) -> Any:
        """Imports and returns the object."""
        ...


@dataclass(frozen=True)
class PluginRow:
    """One discovered entry point.

    Attributes:
        id: The entry point's name.
        dist: Name of the distribution.
        version: Its version.
        plugin: The loaded plugin, or None.
        error: Why it could not be loaded, or None.
    """

    id: str
    dist: str
    version: str
    plugin: FamilyPlugin | None
    error: str | None

    @property
    def who(self) -> str:
        """Returns the plugin's full name, for messages."""
        return f"plugin {self.id} ({self.dist} {self.version})"


@dataclass(frozen=True)
class Resolution:
    """The plugin and the preset that a job means, with the reason.

    Attributes:
        plugin: The plugin.
        preset: One of its presets.
        row: Where the plugin came from.
        reason: Why these.
    """

    plugin: FamilyPlugin
    preset: ModelPreset
    row: PluginRow
    reason: str

    @property
    def family(self) -> FamilySpec:
        """Returns the plugin's family."""
        return self.plugin.family

    def hooks(self) -> PluginHooks:
        """Returns the four hooks of this plugin alone."""
        return PluginHooks(self.plugin, self.row)


class PluginHooks:
    """The hooks of one plugin; what goes wrong in an author's own body is said to be theirs.

    Args:
        plugin: The plugin.
        row: Where it came from.
    """

    def __init__(self, plugin: FamilyPlugin, row: PluginRow) -> None:
        manager = pluggy.PluginManager("autodeco")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name=plugin.family.id)
        manager.check_pending()
        self._plugin, self._row, self._relay = plugin, row, manager.hook

    def __getattr__(self, name: str) -> Any:
        if name not in hookspecs.HOOKS:
            raise AttributeError(name)
        return partial(self._call, name)

    def _call(self, name: str, **arguments: Any) -> Any:
        own = getattr(type(self._plugin), name) is not getattr(FamilyPlugin, name)
        try:
            result = getattr(self._relay, name)(**arguments)
        except (AutodecoError, OSError, MemoryError):
            raise
        except Exception as error:
            if not own:
                raise
            raise PluginError(
                f"its hook {name} failed: {type(error).__name__}: {error}",
                who=self._row.who,
                fix="report it to the plugin's author; autodeco --debug shows the traceback",
            ) from error
        if result is None:
            raise PluginError(
                f"its hook {name} returned nothing",
                who=self._row.who,
                fix=f"return what autodeco.hookspecs.{name} says, or leave the hook out",
            )
        return result


class Registry:
    """All plugins that are installed.

    Args:
        entry_points: For tests; by default those of the environment.
    """

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        found: Iterable[Any] = (
            metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        )
        self._entries: tuple[EntryPoint, ...] = tuple(
            sorted(found, key=lambda e: (e.name, _dist(e)[0]))
        )
        self._rows: dict[int, PluginRow] = {}

    def rows(self) -> tuple[PluginRow, ...]:
        """Returns every discovered plugin, broken ones included."""
        return tuple(self._row(index) for index in range(len(self._entries)))

    def _row(self, index: int) -> PluginRow:
        if index not in self._rows:
            entry = self._entries[index]
            dist, version = _dist(entry)
            doubles = [_dist(e)[0] for e in self._entries if e.name == entry.name]
            plugin, error = _load(entry)
            if len(doubles) > 1:
                plugin = None
                error = f"{len(doubles)} distributions claim the id: {', '.join(doubles)}"
            self._rows[index] = PluginRow(entry.name, dist, version, plugin, error)
        return self._rows[index]

    def get(self, name: str) -> PluginRow:
        """Returns the loaded plugin with this id or alias.

        Raises:
            PluginError: There is none, it is broken, or two distributions claim the id.
        """
        for index, entry in enumerate(self._entries):
            if entry.name == name:
                return _whole(self._row(index))
        aliased = [r for r in self.rows() if r.plugin and name in r.plugin.family.aliases]
        if len(aliased) == 1:
            return aliased[0]
        if aliased:
            raise PluginError(
                f"several plugins have the alias {name!r}: {', '.join(r.who for r in aliased)}",
                fix="name one of them by its id: " + ", ".join(r.id for r in aliased),
            )
        ids = [entry.name for entry in self._entries]
        near = get_close_matches(name, ids, n=1)
        raise PluginError(
            f"no plugin {name!r} is installed",
            where="installed: " + (", ".join(ids) or "none"),
            fix=f"did you mean {near[0]!r}?"
            if near
            else f"pip install autodeco-plugin-{name.replace('_', '-')}",
        )

    def resolve(self, plugin: str | None, model: Path | None, preset: str | None) -> Resolution:
        """Decides which plugin and preset are meant.

        The order is: `plugin` (id or alias), the checkpoint's exact model id, its ``config.json``
        architecture and shape.

        Raises:
            PluginError: None matches, or several do; the message says what to install or name.
            WeightsError: The checkpoint's ``config.json`` cannot be read.
        """
        if plugin is not None:
            row = self.get(plugin)
            assert row.plugin is not None
            chosen, reason = choose_preset(row.plugin.family, row.who, model, preset)
            return Resolution(row.plugin, chosen, row, reason)
        if model is None:
            raise PluginError(
                "neither a plugin nor a model is given",
                where="installed: " + (", ".join(e.name for e in self._entries) or "none"),
                fix="add --plugin NAME, or --model DIR",
            )
        return self._resolve_model(model, preset)

    def _resolve_model(self, model: Path, preset: str | None) -> Resolution:
        config = read_config(model)
        model_id = str(config.get("_name_or_path") or model.name).lower()
        architecture = architecture_of(config)
        matches: list[Resolution] = []
        unfit: list[PluginError] = []
        for row in self.rows():
            if row.plugin is None:
                continue
            family = row.plugin.family
            ids = {i.lower(): p for p in family.presets for i in p.model_ids}
            by_id = ids.get(model_id) or {i.split("/")[-1]: p for i, p in ids.items()}.get(model_id)
            known = any(architecture == a.name for a in family.architectures)
            if not known:
                continue
            if preset is None and by_id is not None and fits(family, by_id, config, model):
                matches.append(Resolution(row.plugin, by_id, row, f"model id {model_id}"))
            else:
                try:
                    chosen, reason = choose_preset(row.plugin.family, row.who, model, preset)
                except PluginError as error:
                    unfit.append(error)
                    continue
                matches.append(Resolution(row.plugin, chosen, row, reason))
        if not matches and unfit:
            raise unfit[0]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise PluginError(
                f"several plugins fit {architecture}: {', '.join(m.row.who for m in matches)}",
                where=str(model),
                fix="add --plugin with one of: " + ", ".join(m.row.id for m in matches),
            )
        broken = [row.who for row in self.rows() if row.error]
        raise PluginError(
            f"no installed plugin knows the architecture {architecture!r}"
            + (f" (broken: {', '.join(broken)})" if broken else ""),
            where=str(model),
            fix=f"pip install autodeco-plugin-{_dist_guess(config)}, or write a plugin for it",
        )


def _dist(entry: EntryPoint) -> tuple[str, str]:
    dist = getattr(entry, "dist", None)
    return (dist.name, dist.version) if dist is not None else ("unknown distribution", "?")


def _dist_guess(config: dict[str, Any]) -> str:
    name = re.sub(r"_(moe|text)$", "", str(config.get("model_type", "NAME")))
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _load(entry: EntryPoint) -> tuple[FamilyPlugin | None, str | None]:
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:  # a stranger's import may raise anything, or exit
        return None, f"cannot be loaded: {type(error).__name__}: {error}"
    if isinstance(plugin, type) and issubclass(plugin, FamilyPlugin):
        return None, f"{entry.value} is a class, not a plugin: give FamilyPlugin(FAMILY)"
    if not isinstance(plugin, FamilyPlugin) or not isinstance(plugin.family, FamilySpec):
        return None, f"{entry.value} is a {type(plugin).__name__}, not a FamilyPlugin"
    if not OLDEST_API <= plugin.family.api <= API:
        spoken = f"api {API}" if OLDEST_API == API else f"apis {OLDEST_API} to {API}"
        return None, f"written for api {plugin.family.api}; this autodeco speaks {spoken}"
    if any(preset.name == AUTO_PRESET for preset in plugin.family.presets):
        return None, f"a preset of its is called {AUTO_PRESET!r}, which means the checkpoint's own"
    if plugin.family.id != entry.name:
        return None, f"its family's id is {plugin.family.id!r}, its entry point {entry.name!r}"
    return plugin, None


def _whole(row: PluginRow) -> PluginRow:
    if row.error is None:
        return row
    raise PluginError(
        row.error,
        who=row.who,
        fix="uninstall all but one of them"
        if "claim the id" in row.error
        else f"reinstall or upgrade {row.dist}, or report it to its author",
    )
