"""steprule: write an optimizer's step rule once; run it everywhere with the same numbers."""

from steprule import schedules as schedules
from steprule.catalogue import Description as Description
from steprule.catalogue import catalogue as catalogue
from steprule.catalogue import describe as describe
from steprule.closure.lbfgs import LBFGS as LBFGS
from steprule.convert import convert_state as convert_state
from steprule.declare import Elementwise as Elementwise
from steprule.declare import Modifier as Modifier
from steprule.declare import decay as decay
from steprule.declare import hyper as hyper
from steprule.declare import parameter as parameter
from steprule.declare import scalar_slot as scalar_slot
from steprule.declare import slot as slot
from steprule.elementwise.adabelief import AdaBelief as AdaBelief
from steprule.elementwise.adadelta import Adadelta as Adadelta
from steprule.elementwise.adagrad import Adagrad as Adagrad
from steprule.elementwise.adam import Adam as Adam
from steprule.elementwise.adam import AMSGrad as AMSGrad
from steprule.elementwise.adamax import Adamax as Adamax
from steprule.elementwise.adamw import AdamW as AdamW
from steprule.elementwise.asgd import ASGD as ASGD
from steprule.elementwise.dog import DoG as DoG
from steprule.elementwise.dog import LDoG as LDoG
from steprule.elementwise.dowg import DoWG as DoWG
from steprule.elementwise.lamb import LAMB as LAMB
from steprule.elementwise.lars import LARS as LARS
from steprule.elementwise.lion import Lion as Lion
from steprule.elementwise.nadam import NAdam as NAdam
from steprule.elementwise.prodigy import Prodigy as Prodigy
from steprule.elementwise.radam import RAdam as RAdam
from steprule.elementwise.rmsprop import RMSprop as RMSprop
from steprule.elementwise.rprop import Rprop as Rprop
from steprule.elementwise.sgd import SGD as SGD
from steprule.elementwise.sophia import Sophia as Sophia
from steprule.elementwise.sparse_adam import SparseAdam as SparseAdam
from steprule.engine.checkpoint_file import load_checkpoint as load_checkpoint
from steprule.engine.checkpoint_file import save_checkpoint as save_checkpoint
from steprule.engine.load_report import LoadReport as LoadReport
from steprule.engine.memory import MemoryReport as MemoryReport
from steprule.engine.memory import memory_report as memory_report
from steprule.engine.optimizer import explain as explain
from steprule.matrix.adafactor import Adafactor as Adafactor
from steprule.matrix.muon import Muon as Muon
from steprule.modifiers import decay as _modes  # noqa: F401 # pyright: ignore[reportUnusedImport]
from steprule.modifiers.averages import EMA as EMA
from steprule.modifiers.averages import Average as Average
from steprule.modifiers.averages import Lookahead as Lookahead
from steprule.modifiers.cautious import Cautious as Cautious
from steprule.modifiers.clipping import GlobalNormClip as GlobalNormClip
from steprule.modifiers.clipping import UpdateClip as UpdateClip
from steprule.modifiers.hyperball import Hyperball as Hyperball
from steprule.modifiers.trust_ratio import TrustRatio as TrustRatio
from steprule.template import GenericAdaptiveOptimizer as GenericAdaptiveOptimizer
from steprule.template import WeightDecay as WeightDecay

__version__ = "0.1.0"
