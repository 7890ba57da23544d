{{/* Parts of the pods. */}}

{{/* What a namespace with the Pod Security level `restricted` asks of a container. */}}
{{- define "llm-extproc.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "llm-extproc.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "llm-extproc.probe" -}}
{{- $root := index . 0 }}
{{- $service := index . 1 }}
{{- $path := index . 2 }}
{{- if or (eq $root.Values.mode "gateway") $root.Values.tls }}
{{- /* The kubelet knows no gRPC over TLS and no Unix socket. */ -}}
httpGet:
  path: {{ $path }}
  port: admin
{{- else }}
grpc:
  port: {{ include "llm-extproc.grpcPort" $root }}
  service: {{ $service }}
{{- end }}
{{- end }}

{{- define "llm-extproc.mounts" -}}
- name: config
  mountPath: /etc/extproc
  readOnly: true
{{- if .Values.tls }}
- name: tls
  mountPath: /etc/extproc-tls
  readOnly: true
{{- end }}
{{- if .Values.workerApiKey }}
- name: worker-key
  mountPath: /etc/extproc-worker-key
  readOnly: true
{{- end }}
{{- range .Values.tokenizers }}
- name: tokenizer-{{ .name }}
  mountPath: /models/{{ .name }}
  readOnly: true
  {{- with .persistentVolumeClaim }}
  {{- with .subPath }}
  subPath: {{ . | quote }}
  {{- end }}
  {{- end }}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "llm-extproc.volumes" -}}
- name: config
  configMap:
    name: {{ include "llm-extproc.fullname" . }}
{{- with .Values.tls }}
- name: tls
  secret:
    secretName: {{ .secretName }}
{{- end }}
{{- with .Values.workerApiKey }}
- name: worker-key
  secret:
    secretName: {{ .name }}
    items:
      - key: {{ default "token" .key }}
        path: key
{{- end }}
{{- range .Values.tokenizers }}
- name: tokenizer-{{ .name }}
  {{- if .persistentVolumeClaim }}
  persistentVolumeClaim:
    claimName: {{ .persistentVolumeClaim.claimName }}
    readOnly: true
  {{- else if .image }}
  image:
    reference: {{ .image.reference | quote }}
    pullPolicy: {{ default "IfNotPresent" .image.pullPolicy }}
  {{- else }}
  emptyDir:
    sizeLimit: 512Mi
  {{- end }}
{{- end }}
{{- if eq .Values.mode "gateway" }}
- name: run
  emptyDir:
    medium: Memory
    sizeLimit: 32Mi
- name: scripts
  configMap:
    name: {{ include "llm-extproc.fullname" . }}-scripts
{{- end }}
{{- if include "llm-extproc.downloads" . }}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "llm-extproc.downloads" -}}
{{- range .Values.tokenizers }}{{ if .download }}true{{ end }}{{ end }}
{{- end }}

{{/* Downloads the files of one tokenizer: context, entry. */}}
{{- define "llm-extproc.downloadContainer" -}}
{{- $root := index . 0 }}
{{- $tokenizer := index . 1 }}
{{- $download := $tokenizer.download }}
- name: download-{{ $tokenizer.name }}
  image: {{ include "llm-extproc.image" (list $root.Values.image $root.Chart) | quote }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command:
    - hf
    - download
    - {{ $download.repository | quote }}
    - --revision
    - {{ $download.revision | quote }}
    - --local-dir
    - /models/{{ $tokenizer.name }}
    {{- range list "tokenizer.json" "tokenizer_config.json" "special_tokens_map.json" "*.jinja" }}
    - --include
    - {{ . | quote }}
    {{- end }}
  env:
    - name: HF_HOME
      value: /tmp/hf
    - name: HF_ENDPOINT
      value: {{ default "https://huggingface.co" $download.endpoint | quote }}
    {{- with $download.token }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ .name }}
          key: {{ default "token" .key }}
    {{- end }}
    {{- with $root.Values.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    limits: {memory: 512Mi}
  securityContext:
    {{- include "llm-extproc.containerSecurity" $root | nindent 4 }}
  volumeMounts:
    - name: tokenizer-{{ $tokenizer.name }}
      mountPath: /models/{{ $tokenizer.name }}
    - name: tmp
      mountPath: /tmp
{{- end }}

{{/* Writes Envoy's file. */}}
{{- define "llm-extproc.envoyFileContainer" -}}
- name: envoy-file
  image: {{ include "llm-extproc.image" (list .Values.image .Chart) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [extproc, envoy-config, --config, /etc/extproc/extproc.yaml, --output, /run/llm-extproc/envoy.yaml]
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  securityContext:
    {{- include "llm-extproc.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: run
      mountPath: /run/llm-extproc
    {{- include "llm-extproc.mounts" . | nindent 4 }}
{{- end }}

{{/* Envoy starts before the service and ends after it: a native sidecar. */}}
{{- define "llm-extproc.envoyContainer" -}}
- name: envoy
  restartPolicy: Always
  image: {{ include "llm-extproc.image" (list .Values.gateway.image .Chart) | quote }}
  imagePullPolicy: {{ .Values.gateway.image.pullPolicy }}
  command: [envoy]
  args:
    - --config-path
    - /run/llm-extproc/envoy.yaml
    - --concurrency
    - {{ .Values.gateway.concurrency | quote }}
    - --disable-hot-restart
  ports:
    - name: http
      containerPort: {{ include "llm-extproc.envoyPort" . }}
  startupProbe:
    tcpSocket: {port: http}
    periodSeconds: 1
    failureThreshold: 60
  readinessProbe:
    tcpSocket: {port: http}
    periodSeconds: 5
  resources:
    requests:
      cpu: {{ .Values.gateway.concurrency | quote }}
      memory: {{ div (int64 .Values.gateway.memoryMib) 2 }}Mi
    limits:
      memory: {{ int64 .Values.gateway.memoryMib }}Mi
  securityContext:
    {{- include "llm-extproc.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: run
      mountPath: /run/llm-extproc
{{- end }}
