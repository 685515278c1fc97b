package routes.GET.public.__group.documents.__id

import rego.v1

default allowed := true
