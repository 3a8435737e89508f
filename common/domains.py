"""Several datasets in one training, `--data a+b` of cct.py: each is a domain with settings of its
own. A checkpoint of the other scripts has one domain."""
import dataclasses

from common.datasets import check_classes, choose_labelled, open_dataset
from common.datasets.tags import Tagged
from common.settings import UserError, flag, from_saved


GIVEN_FOR_EACH = ("data", "root", "labeled", "split", "tags")  # with + between


class Domain:
    """One of the datasets. number: its place, from 0; cfg: its own settings, with `background`."""

    def __init__(self, number, name, cfg):
        self.number = number
        self.name = name
        self.cfg = cfg
        self.data = open_dataset(cfg.data, cfg.root, cfg.download)
        self.data.name = name
        self.pseudo = None  # its training images with pseudo-labels, if there are some
        check_classes("background", cfg.background, self.data)

    def choose_labelled(self):
        """Set labelled and unlabelled (if all are labelled, then both are all), and tags."""
        cfg = self.cfg
        self.labelled, others = choose_labelled(self.data, cfg.labeled, cfg.split, cfg.seed)
        self.unlabelled = others or self.labelled
        self.tags = Tagged(self.data, self.labelled, cfg.tags) if cfg.weak else None


def one_each(name, text, count):
    """Values of a flag that takes one for all of `count` domains, or one for each with + between;
    files of labels must be given for each. Raises UserError for another number of values."""
    values = text.split("+") if count > 1 else [text]
    if len(values) == 1 and (name in ("root", "labeled") or not text):
        values *= count
    if len(values) != count:
        raise UserError(f"{flag(name)} {text}: expected {count} with + between, one for each of "
                        f"the domains of --data")
    return values


def settings_of_domains(cfg, given, presets, own):
    """{name: settings} of the domains of cfg.data; folder+folder gives folder and folder_2.

    own: fields that every domain takes from its own dataset's preset, unless a flag sets them.
    """
    names = cfg.data.split("+")
    parts = {name: one_each(name, getattr(cfg, name), len(names)) for name in GIVEN_FOR_EACH}
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    from_preset = [name for name in own
                   if given.keys().isdisjoint((name, fields[name].metadata["replaces"]))]
    domains = {}
    for number, data in enumerate(names):
        preset = type(cfg)(**presets.get(data, {}))
        values = {name: getattr(preset, name) for name in from_preset}
        values |= {name: part[number] for name, part in parts.items()}
        name = f"{data}_{number + 1}" if data in domains else data
        domains[name] = dataclasses.replace(cfg, **values)
    return domains


def saved_domains(state, config_class, given, path):
    """Domains of a checkpoint: all, or the one that --data names. -> [(number, name, settings)]
    Raises UserError if none has this name."""
    known = state["domains"]
    numbers = range(len(known))
    given = dict(given)
    if given.get("data") == state["config"]["data"]:
        del given["data"]
    if len(known) > 1 and "data" in given:
        names = [domain["name"] for domain in known]
        if given["data"] not in names:
            raise UserError(f"--data {given['data']}: {path} knows the domains {', '.join(names)}")
        numbers = [names.index(given.pop("data"))]
    configs = [from_saved(config_class, state["config"] | known[number].get("own", {}), given)
               for number in numbers]
    if "root" in given:
        for config, root in zip(configs, one_each("root", given["root"], len(configs))):
            config.root = root
    return [(number, known[number]["name"] if len(known) > 1 else config.data, config)
            for number, config in zip(numbers, configs)]


def mean_miou(confusions):
    """The mean over the domains of {name: ConfusionMatrix}, 0..1"""
    return sum(confusion.miou() for confusion in confusions.values()) / len(confusions)


def say_tables(confusions, domains, ctx):
    """Print the table of every domain."""
    for domain in domains:
        if len(domains) > 1:
            ctx.say(f"{domain.name}:")
        ctx.say(confusions[domain.name].table(domain.data.classes))
