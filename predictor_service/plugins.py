"""Which predictors are installed: the entry points of the group `promoe.predictors`, found by their name."""

from importlib.metadata import EntryPoint, entry_points

from predictor_service.predictor import ENTRY_POINT_GROUP, Predictor, PredictorSource
from promoe.config import SettingUnfit


def installed_predictors() -> dict[str, EntryPoint]:
    """By name; of two with one name, the one that comes first on the import path."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, point)
    return dict(sorted(found.items()))


def plugin_named(name: str) -> EntryPoint:
    """Not loaded yet.

    Raises:
        SettingUnfit: there is no such plug-in; the installed ones are listed.
    """
    installed = installed_predictors()
    point = installed.get(name)
    if point is None:
        raise SettingUnfit(f"predictor.predictor is {name!r}; installed: auto, {', '.join(installed)}")
    return point


def make_predictor(name: str, source: PredictorSource) -> Predictor:
    """Loads the plug-in and makes its predictor.

    Raises:
        SettingUnfit: there is no such plug-in, or it cannot be imported.
        PromoeError: what the plug-in refuses the source with.
    """
    point = plugin_named(name)
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise SettingUnfit(
            f"predictor.predictor is {name!r}, but its plug-in {point.value} cannot be loaded: {error}"
        ) from error
    predictor: Predictor = factory(source)
    return predictor
