"""Parameter groups by what the parameters are in their modules, and whether they hold the whole model."""

from steprule.groups.auditing import Audit as Audit
from steprule.groups.auditing import audit as audit
from steprule.groups.building import Groups as Groups
from steprule.groups.building import build as build
from steprule.groups.splitting import split as split
