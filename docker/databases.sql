-- Run once by the server's image, as its superuser: a database and a role for each part of the service, and neither
-- role may connect to the other's. The passwords are taken from the environment.
\set ON_ERROR_STOP on
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv autotune_password AUTOTUNE_DB_PASSWORD

CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE autotune LOGIN PASSWORD :'autotune_password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE autotune OWNER autotune;

REVOKE ALL ON DATABASE mlflow, autotune, postgres, template1 FROM PUBLIC;
