"""Checks of the configuration of an injected update.

An injected adapter names this file in its ``auto_map``, so that transformers loads it with the adapter.
"""

from .configuration_unihyperlora import UniHyperLoraConfig, check_number, check_size
from .errors import ConfigError
from .layouts import MODULE_TYPES, layout_from
from .storage import MAX_WEIGHTS_BYTES

__all__ = ["UniHyperLoraConfig", "check_injected"]

_ALLOWED = {"projector": ("dimension", "host"), "router": ("token", "static"), "router_top_k": (1, 2, 3)}
_DEFAULTS = {"projector": "dimension", "router": "token", "router_top_k": 2}
_MOST_BLOCKS, _MOST_SHAPES = 256, 64
_LARGEST_SIZE = 4096


def check_injected(config) -> None:
    """Set the defaults of an injected update; raise ``ConfigError`` unless all its values are allowed."""
    for name, allowed in _ALLOWED.items():
        if getattr(config, name) is None:
            setattr(config, name, _DEFAULTS[name])
        value = getattr(config, name)
        if value not in allowed or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is not allowed; choose one of {allowed}.")
    for name in ("anchor_dim", "mixer_hidden"):
        check_size(name, getattr(config, name), _LARGEST_SIZE)
    if config.router_top_k > config.atoms:
        raise ConfigError(f"router_top_k={config.router_top_k} exceeds atoms={config.atoms}.")
    if config.space is not None:
        raise ConfigError(
            "space is for a stream; an injected update has none. Leave it out, or give pathway='stream'."
        )
    if not isinstance(config.host_layouts or {}, dict):
        raise ConfigError(f"host_layouts must be a dict of host family → layout; got {config.host_layouts!r}.")
    config.host_layouts = dict(config.host_layouts or {})
    for family, layout in config.host_layouts.items():
        layout_from(layout, family)
    _check_sat_lora(config)


def _check_sat_lora(config) -> None:
    """Check the settings of SAT-LoRA (projector "host"); other projectors must not have them."""
    if config.projector != "host":
        given = (config.bound_host, config.share_across_layers, config.target_modules, config.atom_scale)
        if given != (None, True, None, 1.0):
            raise ConfigError(
                "bound_host, share_across_layers, target_modules and atom_scale need projector='host', but projector "
                f"is {config.projector!r}. Leave them out."
            )
        return
    if config.router != "token":
        raise ConfigError("projector='host' needs router='token'; leave router out.")
    if not isinstance(config.share_across_layers, bool):
        raise ConfigError(f"share_across_layers={config.share_across_layers!r} is not allowed; give true or false.")
    check_number("atom_scale", config.atom_scale, 1e-3, 1e3)
    if config.target_modules is not None:
        good = isinstance(config.target_modules, list) and config.target_modules
        if not good or not all(name in MODULE_TYPES for name in config.target_modules):
            raise ConfigError(
                f"target_modules={config.target_modules!r} is not allowed; give a list of one or more of "
                f"{', '.join(MODULE_TYPES)}."
            )
    if config.bound_host is None:  # set when the adapter is first bound to a host
        return
    check_bound_host(config.bound_host)
    sets = 1 if config.share_across_layers else config.bound_host["num_layers"]
    values = sets * config.atoms * (sum(map(sum, config.bound_host["shapes"])) + config.bound_host["hidden_size"])
    if values > MAX_WEIGHTS_BYTES:
        raise ConfigError(
            f"atoms={config.atoms} for the host in bound_host is not allowed: the atoms would have {values:,} values, "
            f"and {MAX_WEIGHTS_BYTES:,} is the maximum."
        )


def check_bound_host(host: object) -> None:
    """Raise ``ConfigError`` unless ``host`` describes a host as ``sat_lora.bind`` does."""
    shapes = host.get("shapes") if isinstance(host, dict) else None
    good = isinstance(shapes, list) and 0 < len(shapes) <= _MOST_SHAPES
    if not good or not all(isinstance(s, list) and len(s) == 2 and all(map(_is_size, s)) for s in shapes):
        raise ConfigError(
            f"bound_host={host!r} does not describe a host with the shapes of its linear layers. Use the config.json "
            "that was saved with the adapter."
        )
    sizes, texts = ("hidden_size", "num_layers"), ("family", "fingerprint", "dtype")
    good = host.keys() == {"shapes", *sizes, *texts} and all(_is_size(host[size]) for size in sizes)
    if not good or host["num_layers"] > _MOST_BLOCKS or not all(isinstance(host[text], str) for text in texts):
        raise ConfigError(
            f"bound_host={host!r} does not describe a host: {', '.join((*sizes, *texts))}. Use the config.json that "
            "was saved with the adapter."
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIZE * 4
