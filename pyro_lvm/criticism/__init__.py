"""How good a fit is: evidence, and estimators compared."""
