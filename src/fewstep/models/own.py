"""A network of the user's own, or of another library, by the name of the function that builds it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from fewstep.errors import InputError


def own_network(name: str, classes: int, picture: tuple[int, int, int]) -> nn.Module:
    """What `module:function` gives, called with `num_classes=classes`, as torchvision's and timm's functions take it.

    picture : channels, height and width of what it is to tell apart
    The module is looked for in the folder of work, too. Raises `InputError` where there is no such function, where it
    fails, or where it gives something else.

    >>> own_network("torch.nn:Flat", 5, (3, 84, 84))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    fewstep.errors.InputError: there is no network 'torch.nn:Flat'
    """
    where, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        build = getattr(import_module(where), function)
    except Exception as error:  # a module fails in any way
        raise InputError(
            f"there is no network {name!r} ({type(error).__name__}: {error}); give MODULE:FUNCTION, of a module that "
            "Python finds from here"
        ) from error
    try:
        net = build(num_classes=classes)
        if not isinstance(net, nn.Module):
            raise TypeError(f"it gives a {type(net).__name__}, not a torch.nn.Module")
        with torch.no_grad():
            shape = tuple(net.eval()(torch.zeros(2, *picture)).shape)
        if shape != (2, classes):
            raise ValueError(f"of 2 pictures it gives {list(shape)}, not [2, {classes}]")
    except Exception as error:
        raise InputError(
            f"{name}(num_classes={classes}) is no net that tells {classes} classes apart by pictures "
            f"{list(picture)} ({type(error).__name__}: {error})"
        ) from error
    return net.train()
