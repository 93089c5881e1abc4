"""Latent variable models as Pyro programs: declare, fit with any ELBO, know how good the fit is, look in ArviZ."""

from __future__ import annotations

from pyro_lvm import datasets, elbo, exact, likelihoods, networks, plots, priors, schedules, testing
from pyro_lvm.criticism.amortization import AmortizationGap, amortization_gap
from pyro_lvm.criticism.bits import bits_per_dimension
from pyro_lvm.criticism.calibration import calibration
from pyro_lvm.criticism.compare import compare_elbos
from pyro_lvm.criticism.decompose import Decomposition, decompose
from pyro_lvm.criticism.diagnose import diagnose
from pyro_lvm.criticism.evidence import log_evidence
from pyro_lvm.criticism.findings import Diagnosis, Finding
from pyro_lvm.criticism.gradients import GradientReport, gradient_report
from pyro_lvm.criticism.runs import diagnose_runs
from pyro_lvm.errors import NonFiniteError, NotEnoughMemoryError, ProgramError, ProgramWarning, StorageError
from pyro_lvm.inference.chains import Chains
from pyro_lvm.inference.check import check
from pyro_lvm.inference.coordinate_ascent import coordinate_ascent
from pyro_lvm.inference.early_stopping import EarlyStopping
from pyro_lvm.inference.em import em
from pyro_lvm.inference.fit import fit
from pyro_lvm.inference.loading import load
from pyro_lvm.inference.mcmc import mcmc
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.select import Candidate, Selection, select
from pyro_lvm.label_switching import align_components
from pyro_lvm.models.bayesian_ppca import BayesianPPCA
from pyro_lvm.models.factor_analysis import FactorAnalysis
from pyro_lvm.models.gaussian_mixture import GaussianMixture
from pyro_lvm.models.ppca import PPCA
from pyro_lvm.models.semi_supervised_vae import SemiSupervisedVAE
from pyro_lvm.models.vae import VAE
from pyro_lvm.posterior import Posterior
from pyro_lvm.preflight.report import Report

__version__ = "0.1.0"

__all__ = [
    "PPCA",
    "VAE",
    "AmortizationGap",
    "BayesianPPCA",
    "Candidate",
    "Chains",
    "Decomposition",
    "Diagnosis",
    "EarlyStopping",
    "FactorAnalysis",
    "Finding",
    "Fit",
    "GaussianMixture",
    "GradientReport",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "Posterior",
    "ProgramError",
    "ProgramWarning",
    "Report",
    "Selection",
    "SemiSupervisedVAE",
    "StorageError",
    "align_components",
    "amortization_gap",
    "bits_per_dimension",
    "calibration",
    "check",
    "compare_elbos",
    "coordinate_ascent",
    "datasets",
    "decompose",
    "diagnose",
    "diagnose_runs",
    "elbo",
    "em",
    "exact",
    "fit",
    "gradient_report",
    "likelihoods",
    "load",
    "log_evidence",
    "mcmc",
    "networks",
    "plots",
    "priors",
    "schedules",
    "select",
    "testing",
]
