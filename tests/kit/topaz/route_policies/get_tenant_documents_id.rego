package routes.GET.__tenant.documents.__id

import rego.v1

default allowed := false
