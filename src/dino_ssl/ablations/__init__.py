"""The paper's tables and figures as training runs: configurations, runner, results, pages."""
