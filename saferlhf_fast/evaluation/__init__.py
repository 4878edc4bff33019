"""How good and how safe a policy is: numbers with their uncertainty, and the page that shows a run."""
