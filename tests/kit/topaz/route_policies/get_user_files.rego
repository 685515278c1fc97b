package routes.GET["user-files"]

import rego.v1

default allowed := true
