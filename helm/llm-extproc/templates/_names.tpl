{{/* Names, labels and images. */}}

{{- define "llm-extproc.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" }}
{{- end }}

{{- define "llm-extproc.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trimSuffix "-" }}
{{- else }}
{{- $name := include "llm-extproc.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 53 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "llm-extproc.selectorLabels" -}}
app.kubernetes.io/name: {{ include "llm-extproc.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end }}

{{- define "llm-extproc.commonLabels" -}}
app.kubernetes.io/part-of: llm-extproc
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "llm-extproc.labels" -}}
{{ include "llm-extproc.selectorLabels" . }}
{{ include "llm-extproc.commonLabels" . }}
{{- end }}

{{- define "llm-extproc.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "llm-extproc.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* An image; the tag defaults to the version of the chart. */}}
{{- define "llm-extproc.image" -}}
{{- $image := index . 0 }}
{{- $chart := index . 1 }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default $chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}
