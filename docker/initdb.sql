-- Optuna and MLflow both keep a table `alembic_version`, so each gets a database of its own.
CREATE DATABASE mlflow;
